"""Fine-tune image classifiers in a notebook, on fastai, and trust the result.

`from ftlib import *` replaces `from fastai.vision.all import *`: it brings all of fastai's names, with ftlib's in
place of those that it improves. Names are loaded when the first of them is asked for, so that `ftlib --help` and
`import ftlib.cli` wait for no torch.
"""

__version__ = "0.1.0"

import warnings
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING: from fastai.vision.all import *  # noqa: F403

# What users write, by room, in the order of the way through; ours win over fastai's.
_ROOMS = {
    "errors": "DataError WeightsError ArchError RateError CurveError MetricError PrecisionError TrainError "
              "CheckpointError RunFailed EvaluateError DeployError CompareError RunError",
    "system.interrupt": "TrainingStopped",
    "data.sources": "read_source",
    "data.splits": "make_imbalanced",
    "data.images": "image_data ImageData",
    "data.make_shards": "write_shards index_shards",
    "data.stream": "stream_data",
    "data.audit": "audit",
    "data.examples": "example_data",
    "models.network": "Network",
    "models.arch": "backbones",
    "models.backbone": "backbone create_network",
    "models.cnn": "cnn",
    "models.precision": "PrecisionPolicy",
    "cache.features": "MixFeatures",
    "metrics.metric": "top_k",
    "persist.checkpoint": "Checkpoint checkpoints load_checkpoint",
    "lr.schedule": "Constant Step Exponential Cosine Linear Warmup OneCycle FlatCosine",
    "lr.optimizer": "TorchOptimizer",
    "lr.curve": "LRCurve",
    "callbacks.history": "Recorder",
    "callbacks.best": "BestWeights",
    "callbacks.trackers": "ReduceLROnPlateau SaveModelCallback CSVLogger",
    "callbacks.stopping": "EarlyStopping RecoverFromNaN",
    "callbacks.ema": "EMA",
    "callbacks.budget": "Budget",
    "callbacks.loss_scaling": "LossScaling",
    "callbacks.loggers": "MLflowLogger WandbLogger",
    "train.blend": "average_weights",
    "train.learner": "Learner load_learner",
    "train.vision": "vision_learner unet_learner",
    "teach.distill": "Distill",
    "teach.pseudo": "pseudo_labels",
    "teach.hints": "Hints",
    "teach.rotation": "rotation_learner",
    "teach.probe": "probe",
    "evaluate.report": "Report",
    "evaluate.calibrate": "Calibration",
    "evaluate.gradcam": "",
    "evaluate.labels": "",
    "evaluate.threshold": "choose_threshold detection",
    "deploy.predict": "predict_images as_predictor",
    "deploy.bundle": "save_bundle load_bundle",
    "deploy.onnx": "write_onnx",
    "deploy.openvino": "write_openvino",
    "deploy.latency": "",
    "deploy.update": "",
    "deploy.refit": "",
    "deploy.uploads": "Limits",
    "deploy.endpoint": "web_app serve",
    "deploy.app": "classifier_page",
    "deploy.hub": "",
    "parallel.cluster": "ray_cluster",
    "experiment.paired": "paired_test",
    "experiment.runs": "RunStore",
    "experiment.soup": "Soup",
    "experiment.compare": "compare Comparison",
    "experiment.recipes": "RECIPES recipes probes distillation trainer",
    "experiment.choose": "choose_body",
    "experiment.crossval": "cross_validate CrossValidation",
    "experiment.few_labels": "label_efficiency_curve LabelEfficiencyCurve",
    "experiment.pipeline": "fine_tune_run FineTuneResult",
    "experiment.best": "best_classifier BestClassifier",
    "search.space": "Choice Uniform LogUniform Int",
    "search.tune": "tune",
    "search.tuning": "Tuning",
    "search.joint": "joint_space joint_trainer tune_folder",
}


# Names of before, which are still given, with a warning
_RENAMED = {
    "skew": "make_imbalanced",
    "Arithmetic": "PrecisionPolicy",
    "StopOnNaN": "RecoverFromNaN",
    "Run": "FineTuneResult",
    "Runs": "RunStore",
    "paired": "paired_test",
    "label_curve": "label_efficiency_curve",
    "LabelCurve": "LabelEfficiencyCurve",
}


def renamed_method(old, new):
    "The method `new` by its name of before"
    def method(self, *args, **kwargs):
        warnings.warn(f"`{old}` is called `{new}` now", DeprecationWarning, stacklevel=2)
        return getattr(self, new)(*args, **kwargs)
    method.__name__, method.__doc__ = old, f"Deprecated: `{new}`"
    return method


def _public(module):
    "The names that `from module import *` brings"
    names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    return {n: getattr(module, n) for n in names}


def _load():
    "fastai's names, then ours, into this module"
    found = _public(import_module("fastai.vision.all"))
    for room, names in _ROOMS.items():
        module = import_module(f"ftlib.{room}")
        found |= {n: getattr(module, n) for n in names.split()}
    globals().update(found, __all__=list(found))


def __getattr__(name):
    "Load all names when the first is asked for; a name of before gives what it is called now, with a warning."
    if name in _RENAMED:
        warnings.warn(f"`{name}` is called `{_RENAMED[name]}` now", DeprecationWarning, stacklevel=2)
        return globals().get(_RENAMED[name]) or __getattr__(_RENAMED[name])
    if "__all__" in globals() or (name.startswith("__") and name != "__all__"):
        raise AttributeError(f"module 'ftlib' has no attribute {name!r}")
    _load()
    if name not in globals(): raise AttributeError(f"module 'ftlib' has no attribute {name!r}")
    return globals()[name]


def __dir__():
    "Every name, for completion"
    if "__all__" not in globals(): _load()
    return sorted(globals())
