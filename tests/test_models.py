"""Networks as stages and a head: every torchvision classifier, every timm family, and fastai beside them."""

import copy
import io
import pickle
import time
import warnings
from functools import partial
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from ftlib.models.arch import ArchError, find_arch, timm_names, torchvision_names
from ftlib.models.backbone import backbone, backbones, create_network
from ftlib.models.network import is_norm
from ftlib.models.stages import split
from ftlib.models.weights import WeightsError, packaged_file

# Their code decides by what it sees, so they stay in one piece: a body and a head, two groups.
WHOLE = {"gemma4_vit", "twins"}
# Shapes of its LSTM are worked out step by step: 20 s and more.
SLOW = {"sequencer"}


class WithoutMemory(TorchFunctionMode):
    "Weights go to the meta device; what a network computes while it is built (regnet's widths, our mean and std) stays real"
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones): kwargs.setdefault("device", "meta")
        return func(*args, **kwargs)


def problems(arch, mean, std, groups=3):
    "What is wrong with the network of `arch` with a head for 5 classes"
    with WithoutMemory(): net = create_network(arch, 5, weights=None)
    held = [id(p) for g in net.groups() for p in g]
    if sorted(held) != sorted(id(p) for p in net.parameters()): yield "parameters that are not in exactly one group"
    if len(net.groups()) < groups: yield f"only {net.group_names()}"
    if not torch.allclose(net.mean.flatten(), torch.tensor(mean)): yield f"mean {net.mean.flatten().tolist()}, not {mean}"
    if not torch.allclose(net.std.flatten(), torch.tensor(std)): yield f"std {net.std.flatten().tolist()}, not {std}"
    net.to("meta").freeze().train()
    out = net(torch.empty(2, 3, net.input_size, net.input_size, device="meta"))
    if tuple(out.shape) != (2, 5): yield f"output {tuple(out.shape)}"
    if any(p.requires_grad for p in net.body.parameters()): yield "a frozen body trains"
    if not all(p.requires_grad for p in net.head.parameters()): yield "the head does not train"
    if any(m.training for s in net.stages for m in s.modules()): yield "a frozen stage is in training mode"
    if not net.head.training: yield "the head is in evaluation mode"


def sweep(expected):
    "Problems by name, for a mapping of names to (mean, std, least number of groups)"
    found = {}
    for name, want in expected.items():
        try: found[name] = list(problems(name, *want))
        except Exception as e: found[name] = [f"{type(e).__name__}: {str(e)[:200]}"]
    return {n: p for n, p in found.items() if p}


def test_all_torchvision_classifiers(capsys):
    start, expected = time.perf_counter(), {}
    for name in torchvision_names():
        pre = torchvision.models.get_model_weights(name).DEFAULT.transforms()
        expected[name] = pre.mean, pre.std, 3
    found = sweep(expected)
    with capsys.disabled():
        print(f"\n{len(expected) - len(found)} of {len(expected)} torchvision classifiers, {time.perf_counter() - start:.0f} s")
    assert len(expected) >= 80
    assert not found


def timm_families():
    "The first name of each family that timm has"
    from timm.models import _registry
    first = {}
    for name in timm_names(): first.setdefault(_registry._model_to_module[name], name)
    return {f: n for f, n in first.items() if f not in SLOW}


def test_timm_families(capsys):
    import timm
    start, expected = time.perf_counter(), {}
    for family, name in timm_families().items():
        cfg = timm.get_pretrained_cfg(name)
        expected[f"timm/{name}"] = cfg.mean, cfg.std, 2 if family in WHOLE else 3
    found = sweep(expected)
    with capsys.disabled():
        print(f"\n{len(expected) - len(found)} of {len(expected)} timm families, {time.perf_counter() - start:.0f} s")
    assert len(expected) >= 40
    assert not found
