"""On a GPU: what was saved on the CPU or the GPU goes on there, and what comes out does not depend on where it was."""

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.metrics import accuracy
from fastai.optimizer import Adam, Lookahead

from ftlib.data.images import image_data
from ftlib.deploy.bundle import load_bundle, save_bundle
from ftlib.deploy.predict import as_predictor
from ftlib.models import precision
from ftlib.models.cnn import cnn
from ftlib.persist.checkpoint import load_checkpoint
from ftlib.train.vision import vision_learner

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    labels = ["dark", "light"] * 20
    pixels = [rng.integers(0, 128, (16, 16, 3)) + 127 * (label == "light") for label in labels]
    return {"image": [p.astype(np.uint8) for p in pixels], "label": labels}


def learner(images, device="cuda", **kwargs):
    dls = image_data(images, size=16, bs=8, seed=0, num_workers=0, valid=.3, device=torch.device(device))
    torch.manual_seed(0)
    return vision_learner(dls, cnn(dls, channels=(8, 16)), metrics=accuracy, seed=0, **dict(precision="fp32") | kwargs)


def quiet(learn, method, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, method)(*args, **kwargs)


def looking_ahead(params, lr): return Lookahead(Adam(params, lr=lr))


@pytest.mark.parametrize("opt_func", [Adam, torch.optim.AdamW, torch.optim.SGD, looking_ahead])
@pytest.mark.parametrize("written", ["cuda", "cpu"])
def test_a_new_learner_goes_on_from_a_checkpoint(images, tmp_path, opt_func, written):
    quiet(learner(images, written, opt_func=opt_func), "fit", 2, 1e-2, checkpoint=tmp_path)
    for method, args in (("fit", dict(n_epoch=1, lr=1e-3)), ("lr_find", dict(num_it=12, show_plot=False))):
        learn = load_checkpoint(learner(images, opt_func=opt_func), tmp_path)
        quiet(learn, method, **args)
        assert all(p.is_cuda for p in learn.model.parameters())


def test_what_save_wrote_is_loaded_before_the_first_fit(images, tmp_path):
    first = learner(images, path=tmp_path)
    quiet(first, "fit", 1, 1e-2)
    first.save("net")
    second = learner(images, path=tmp_path).load("net")
    quiet(second, "fit", 1, 1e-2)
    assert second.history.valid_loss.notna().all()


def test_batches_that_stay_on_the_cpu(images):
    learn = learner(images, "cpu")
    quiet(learn, "fit", 1, 1e-2)
    assert not any(p.is_cuda for p in learn.model.parameters())


def test_a_bundle_is_read_on_the_gpu(images, tmp_path):
    learn = learner(images)
    assert as_predictor(learn).device == next(learn.model.parameters()).device, "no fit has moved it yet"
    quiet(learn, "fit", 1, 1e-2)
    found = load_bundle(save_bundle(learn, tmp_path / "net.ftl"))
    assert next(found.net.parameters()).is_cuda
    ours, again = (p.predict_images(images["image"], progress=False) for p in (as_predictor(learn), found))
    assert ours.equals(again)
    on_cpu = load_bundle(tmp_path / "net.ftl", device="cpu").predict_images(images["image"], progress=False)
    assert np.allclose(on_cpu.probability, ours.probability, atol=1e-3)


def test_fine_tuning(images):
    learn = learner(images)
    quiet(learn, "fine_tune", 1, freeze_epochs=1)
    assert learn.evaluate().table.value["top1"] > .5


class Overflow(Callback):
    "Infinite gradients in one step"
    order, run_valid = 7, False
    def before_step(self):
        if self.learn.train_iter == 2: list(self.learn.model.parameters())[-1].grad[0] = np.inf


def trained(learn, **kwargs):
    quiet(learn, "fit", 3, 1e-2, **kwargs)
    return [p.detach().cpu() for p in learn.model.parameters()]


@pytest.mark.parametrize("opt_func", [Adam, torch.optim.AdamW, looking_ahead])
def test_half_precision(images, opt_func):
    "The loss of single precision, an overflow that is skipped, and gradients that are clipped when they are divided"
    whole, half = (learner(images, precision=p, opt_func=opt_func, cache=False) for p in ("fp32", "fp16"))
    for learn in (whole, half):
        learn.unfreeze()
        trained(learn, cbs=GradientClip(1.))
    assert np.allclose(whole.history.train_loss, half.history.train_loss, atol=.05)
    before = half.loss_scaling.scale
    trained(half, cbs=Overflow())
    assert half.history.skipped.tolist()[-3:] == [1, 0, 0] and half.loss_scaling.scale == before / 2


def test_half_precision_is_resumed(images, tmp_path):
    class Killed(BaseException): pass
    class Dies(Callback):
        order, is_setting = 99, False
        def after_epoch(self):
            if self.learn.epoch == 1: raise Killed
    def run(place, resume=False, dies=()):
        return trained(learner(images, precision="fp16"), checkpoint=tmp_path / place, resume=resume,
                       cbs=[Overflow(), *dies])
    whole = run("whole")
    with pytest.raises(Killed): run("cut", dies=[Dies()])
    for a, b in zip(whole, run("cut", resume=True), strict=True): assert torch.allclose(a, b, atol=1e-5)


def test_a_gpu_without_bfloat16_tries_half_precision(images, monkeypatch, tmp_path):
    monkeypatch.setenv("FTLIB_CACHE", str(tmp_path))
    monkeypatch.delenv("FTLIB_PRECISION", raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    net, x = learner(images).model.cuda(), torch.rand(64, 3, 16, 16, device="cuda")
    table = precision.measure(net, x)
    assert [p.dtype for p in table.index] == ["fp32", "fp32", "fp16"] and (table.off < .02).all()
    monkeypatch.setattr(precision, "choose", lambda table: table.index[-1])
    learn = learner(images, precision="auto", cache=False)
    learn.unfreeze()
    trained(learn)
    assert learn.precision_policy.dtype == "fp16" and learn.history.skipped.notna().all()
