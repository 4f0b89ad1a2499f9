"""Learners of ftlib and of fastai over the same images, that the benches compare."""

import os
import tempfile
from contextlib import contextmanager

import torch
from fastai.vision import all as fv

import ftlib
from ftlib.cache.features import STORE


@contextmanager
def empty_caches():
    "Context manager in which ftlib has no decoded images, features or choices of precision from before"
    before = os.environ.get("FTLIB_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FTLIB_CACHE"] = folder
        STORE.known.clear()
        try: yield
        finally:
            if before is None: del os.environ["FTLIB_CACHE"]
            else: os.environ["FTLIB_CACHE"] = before


def ftlib_learner(folder, weights, seed, size, bs, arch="resnet18"):
    dls = ftlib.image_data(folder, size=size, bs=bs, seed=seed)
    return ftlib.vision_learner(dls, arch, weights=weights, metrics=fv.accuracy, seed=seed)


def fastai_learner(folder, weights, seed, size, bs, arch="resnet18"):
    fv.set_seed(seed)
    return fastai_head(fv.ImageDataLoaders.from_folder(folder, train="train", valid="valid",
                                                       **fastai_batches(size, bs)), weights, arch)


def fastai_batches(size, bs):
    "Arguments of fastai's data: its own augmentation, ImageNet's statistics"
    return dict(bs=bs, num_workers=2, item_tfms=fv.RandomResizedCrop(size, min_scale=.35),
                batch_tfms=[*fv.aug_transforms(), fv.Normalize.from_stats(*fv.imagenet_stats)])


def fastai_head(dls, weights, arch="resnet18"):
    "fastai's learner with the body of a file, frozen"
    learn = fv.vision_learner(dls, getattr(fv.models, arch, arch), pretrained=False, metrics=fv.accuracy)
    if weights is not None:
        net = getattr(fv.models, arch)()
        net.load_state_dict(torch.load(weights, weights_only=True))
        learn.model[0].load_state_dict(fv.create_body(net, pretrained=False).state_dict())
    learn.freeze()
    return learn
