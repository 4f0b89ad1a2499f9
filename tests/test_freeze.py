"""What fastai means by frozen and what ours means: each test shows both, so that a claim that is out of date fails."""

import warnings

import pytest
import torch
import torchvision
from fastai.callback.training import BnFreeze, set_bn_eval
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner as FastaiLearner
from fastai.losses import CrossEntropyLossFlat
from fastai.vision.learner import create_body, default_split, model_meta
from fastai.vision.learner import vision_learner as fastai_vision_learner
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ftlib.models.arch import torchvision_names
from ftlib.models.backbone import create_network
from ftlib.models.network import is_norm
from ftlib.errors import TrainError
from ftlib.train.learner import Learner
from ftlib.train.vision import vision_learner

BOTH = pytest.mark.parametrize("make", [fastai_vision_learner, vision_learner], ids=["fastai", "ours"])
BOTH_LEARNERS = pytest.mark.parametrize("cls", [FastaiLearner, Learner], ids=["fastai", "ours"])
resnet18 = torchvision.models.resnet18

# Networks of a few thousand weights, with the layers of the large ones
TRANSFORMERS = dict(
    test_convnext={}, test_vit={},
    swin_tiny_patch4_window7_224=dict(img_size=56, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)))


def batches(n=4, side=32, classes=5):
    torch.manual_seed(0)
    pairs = [(torch.rand(3, side, side), i % classes) for i in range(n)]
    dls = DataLoaders.from_dsets(pairs, pairs, bs=4, device="cpu", num_workers=0)
    dls.c = classes
    return dls


def learner(make, arch=resnet18, pretrained=False, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchvision's word on `pretrained=`, which fastai passes
        return make(batches(), arch, pretrained=pretrained, loss_func=CrossEntropyLossFlat(), **kwargs)


def moved(learn):
    "What one epoch moves in the body: kinds of tensors"
    body, before = learn.model[0], {k: v.clone() for k, v in learn.model[0].state_dict().items()}
    norms = {f"{name}.{k}" for name, m in body.named_modules() if is_norm(m) for k, _ in m.named_parameters()}
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    changed = {k for k, v in body.state_dict().items() if not torch.equal(v, before[k])}
    kinds = {k: "statistics" if "running" in k else "norms" if k in norms else "weights" for k in changed}
    return {kind for k, kind in kinds.items() if "tracked" not in k}


# --- norms

@BOTH
@pytest.mark.parametrize("train_bn", [None, True, False])
@pytest.mark.parametrize("cbs", [None, BnFreeze], ids=["", "BnFreeze"])
def test_what_moves_in_a_frozen_body(make, train_bn, cbs):
    learn = learner(make, cbs=cbs, **{} if train_bn is None else dict(train_bn=train_bn))
    learn.freeze()
    if train_bn is None: train_bn = make is fastai_vision_learner
    ours_or_both = make is vision_learner or cbs is BnFreeze
    still = set() if ours_or_both else {"statistics"}
    assert moved(learn) == ({"norms", "statistics"} if train_bn else still)


class Unlearned(nn.Sequential):
    "A body whose norm has statistics and no weights"
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4, affine=False), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@BOTH_LEARNERS
def test_norms_without_weights(cls):
    net = nn.Sequential(Unlearned(), nn.Linear(4, 5))
    learn = cls(batches(), net, CrossEntropyLossFlat(), splitter=default_split, train_bn=False)
    learn.freeze()
    assert moved(learn) == ({"statistics"} if cls is FastaiLearner else set())
    if cls is FastaiLearner:
        with pytest.raises(StopIteration): set_bn_eval(learn.model)
    else:
        learn = cls(batches(), create_network(nn.Sequential(Unlearned(), nn.Linear(4, 9)), 5), CrossEntropyLossFlat())
        learn.freeze()
        assert moved(learn) == set()


@pytest.mark.parametrize("arch", TRANSFORMERS)
def test_layer_norms_of_a_frozen_body(arch):
    def trains(make, **kwargs):
        learn = learner(make, arch, **TRANSFORMERS[arch], **kwargs)
        learn.freeze()
        return sum(p.requires_grad for p in learn.model[0].parameters())
    theirs = trains(fastai_vision_learner)
    assert theirs > 8
    assert trains(vision_learner) == trains(fastai_vision_learner, train_bn=False) == 0
    assert trains(vision_learner, train_bn=True) == theirs


# --- what else is alive in a frozen body

def convnext():
    blocks = [torchvision.models.convnext.CNBlockConfig(*c) for c in ((8, 16, 2), (16, None, 2))]
    return torchvision.models.ConvNeXt(blocks, stochastic_depth_prob=.9, num_classes=9)


def vit():
    net = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=4, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=.5)
    net.heads = nn.Linear(16, 9)  # torchvision's own starts at zero, and so hides all that is before it
    return net


def plain():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Dropout(.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 9))


@BOTH_LEARNERS
@pytest.mark.parametrize("arch", [convnext, vit, plain])
def test_dropout_and_stochastic_depth(cls, arch):
    net = nn.Sequential(arch(), nn.Linear(9, 5)) if cls is FastaiLearner else create_network(arch, 5, weights=None)
    learn = cls(batches(), net, CrossEntropyLossFlat(), splitter=default_split if cls is FastaiLearner else None)
    x = torch.rand(16, 3, 32, 32)
    def steady():
        learn.model.train()
        with torch.no_grad(): return torch.equal(learn.model[0](x), learn.model[0](x))
    learn.freeze()
    assert steady() == (cls is Learner)
    learn.unfreeze()
    assert not steady()
    learn.model.eval()
    with torch.no_grad(): assert torch.equal(learn.model[0](x), learn.model[0](x))


@BOTH
def test_cost_of_a_frozen_body(make):
    learn = learner(make)
    x, y = learn.dls.one_batch()
    def backward():
        learn.model.train().zero_grad()
        loss = learn.loss_func(learn.model(x), y)
        with FlopCounterMode(display=False) as count: loss.backward()
        return count.get_total_flops()
    learn.unfreeze()
    whole = backward()
    learn.freeze()
    share = backward() / whole
    if make is fastai_vision_learner: assert share > .4, "for the sake of the norms all maps have their gradients"
    else:
        assert 0 < share < .02
        assert all(p.grad is None for p in learn.model.body.parameters())


# --- groups

@BOTH_LEARNERS
def test_freezing_a_model_of_one_group(cls):
    learn = cls(batches(), plain(), loss_func=CrossEntropyLossFlat())
    if cls is FastaiLearner: learn.freeze()
    else:
        with pytest.raises(TrainError, match="one parameter group.*splitter="): learn.freeze()
    assert all(p.requires_grad for p in learn.model.parameters())


@pytest.fixture
def asked(monkeypatch):
    "Weights of the right shapes in place of downloads; gives the enum members that were asked for"
    seen = []
    def state(weights, **kwargs):
        seen.append(weights)
        known = (n for n in torchvision_names() if isinstance(weights, torchvision.models.get_model_weights(n)))
        return torchvision.models.get_model(next(known)).state_dict()
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", state)
    return seen


def test_fastai_knows_few_of_torchvisions_classifiers():
    known = [n for n in torchvision_names() if torchvision.models.get_model_builder(n) in model_meta]
    assert len(known) < len(torchvision_names()) / 4


@BOTH
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "regnet_y_400mf"])
def test_groups_and_normalization_of_torchvisions_classifiers(make, name, asked):
    learn = learner(make, torchvision.models.get_model_builder(name), pretrained=True)
    pre = asked[-1].transforms()
    outside = [t for t in learn.dls.train.after_batch.fs if isinstance(t, Normalize)]
    if make is fastai_vision_learner:
        assert len(learn.opt.param_lists) == 2 and not outside
        assert not any("normalize" in n.lower() for n, _ in learn.model.named_modules())
    else:
        assert len(learn.opt.param_lists) >= 3
        assert len(outside) == 1 and learn.model.mean is None, "fastai's loaders normalise their batches"
        assert outside[0].mean.flatten().tolist() == pytest.approx(pre.mean)
        assert outside[0].std.flatten().tolist() == pytest.approx(pre.std)


@BOTH
def test_the_weights_that_are_asked_for(make, asked):
    learner(make, torchvision.models.mobilenet_v3_large, pretrained=True, weights="IMAGENET1K_V2")
    assert (asked[-1].name == "IMAGENET1K_V2") == (make is vision_learner)


@BOTH
@pytest.mark.parametrize("arch", ["test_resnet", *TRANSFORMERS])
def test_groups_of_timms_classifiers(make, arch):
    learn = learner(make, arch, **TRANSFORMERS.get(arch, {}))
    learn.create_opt()
    groups = len(learn.opt.param_lists)
    assert groups == 2 if make is fastai_vision_learner else groups >= 3


# --- bodies

def n_params(m): return sum(p.numel() for p in m.parameters())


@pytest.mark.parametrize("name, classifier, wrong", [
    ("shufflenet_v2_x0_5", "fc", "parameters"), ("mnasnet0_5", "classifier", StopIteration),
    ("vit_b_16", "heads", StopIteration), ("googlenet", "fc", RuntimeError)])
def test_bodies_that_fastai_cannot_cut(name, classifier, wrong):
    kwargs = dict(aux_logits=False, init_weights=False) if name == "googlenet" else {}
    with torch.device("meta"): whole = torchvision.models.get_model(name, **kwargs)
    own = n_params(whole) - n_params(getattr(whole, classifier))
    if wrong == "parameters": assert n_params(create_body(whole, pretrained=False)) < own / 100
    else:
        with pytest.raises(wrong):
            with_aux = torchvision.models.googlenet(init_weights=False) if name == "googlenet" else whole
            create_body(with_aux, pretrained=False)(torch.rand(2, 3, 64, 64))
    net = create_network(name, 5, weights=None).eval()
    assert n_params(net.body) == own
    side = net.input_size if name == "vit_b_16" else 64
    with torch.no_grad(): assert net(torch.rand(1, 3, side, side)).shape == (1, 5)


@BOTH
def test_a_cut_of_ones_own(make):
    learn = learner(make, cut=-3)
    convolutions = [m.out_channels for m in learn.model[0].modules() if isinstance(m, nn.Conv2d)]
    assert max(convolutions) == (512 if make is fastai_vision_learner else 256)
    if make is vision_learner: assert learn.model.stage_names == ["stem", "stage1", "stage2", "stage3", "pool"]
