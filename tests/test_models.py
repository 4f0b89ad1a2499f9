"""Every torchvision classifier and a member of every timm family, as stages with a new head."""
import warnings

import pytest
import torch
from torch import nn

import timm
from timm.models import _registry

from ftlib.models.backbone import ArchError, create_network, find_arch, torchvision_names
from ftlib.models.network import is_norm
from ftlib.models.weights import WeightsError, load_state

SLOW_TO_BUILD = {'regnet_y_128gf'}   # 645 million parameters: built on its own below


def families():
    "One name for each of timm's modules"
    first = {}
    for name in timm.list_models(): first.setdefault(_registry._model_to_module[name], f'timm/{name}')
    return list(first.values())


def checked(name, groups=3):
    "Builds `name` without memory for its weights where it can be; gives what is wrong, or None"
    meta = not name.startswith('regnet')  # their construction moves weights
    with warnings.catch_warnings(), torch.device('meta' if meta else 'cpu'):
        warnings.simplefilter('ignore')
        net = create_network(name, 5, weights=None)
    arch, held = find_arch(name), [id(p) for g in net.groups() for p in g]
    net.freeze_to(-1).train()
    if sorted(held) != sorted(id(p) for p in net.parameters()): return 'a parameter is in no stage, or in two'
    if any(p.requires_grad for p in net.body.parameters()): return 'the frozen body has parameters that train'
    if any(m.training for s in net.stages for m in s.modules() if is_norm(m)): return 'statistics of the frozen body move'
    if not all(p.requires_grad for p in net.head.parameters()): return 'the head does not train'
    if len(net.groups()) < groups: return f'{len(net.groups())} groups'
    if meta and tuple(net(torch.empty(2, 3, net.input_size, net.input_size, device='meta')).shape) != (2, 5): return 'shape'
    if not meta and torch.allclose(net.mean.flatten(), torch.tensor(arch.mean)) is False: return 'normalization'
    return None


def wrong(names, **kwargs):
    "Name → what is wrong with it"
    found = {}
    for name in names:
        try: problem = checked(name, **kwargs)
        except Exception as e: problem = f'{type(e).__name__}: {str(e)[:200]}'
        if problem: found[name] = problem
    return found


def test_every_torchvision_classifier(capsys):
    names = [n for n in torchvision_names() if n not in SLOW_TO_BUILD]
    bad = wrong(names)
    with capsys.disabled(): print(f'\ntorchvision: {len(names) - len(bad)} of {len(names)} classifiers in stages')
    assert len(names) == 79 and not bad, bad


def test_timm_families(capsys):
    names = families()[::2]
    bad = wrong(names)
    with capsys.disabled(): print(f'\ntimm: {len(names) - len(bad)} of {len(names)} families in stages; not: {bad}')
    assert len(names) - len(bad) >= 40


@pytest.mark.slow
def test_all_timm_families(capsys):
    names = families()
    bad = wrong([*names, *SLOW_TO_BUILD])
    with capsys.disabled(): print(f'\ntimm: {len(names) - len(bad)} of {len(names)} families in stages; not: {bad}')
    assert len(bad) <= 5, bad


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v3_small', 'densenet121', 'squeezenet1_1', 'shufflenet_v2_x0_5', 'vit_b_16', 'mnasnet0_5',
                                  'googlenet', 'timm/convnext_atto', 'timm/efficientnet_lite0', 'timm/test_vit', 'timm/levit_128s'])
def test_features_are_the_networks_own(name):
    arch = find_arch(name)
    torch.manual_seed(0)
    net = arch.build().eval()
    staged = create_network(name, 5, weights=net, concat_pool=False, normalize=False).eval()
    x = torch.rand(1, 3, arch.size, arch.size)
    with torch.no_grad(): assert torch.allclose(net(x).flatten(1), staged.body(x), atol=1e-4)


def test_normalization_is_the_makers():
    for name in ('resnet50', 'timm/tf_efficientnet_lite0', 'timm/vit_base_patch16_224'):
        arch, net = find_arch(name), create_network(name, 2, weights=None)
        assert torch.allclose(net.mean.flatten(), torch.tensor(arch.mean)) and torch.allclose(net.std.flatten(), torch.tensor(arch.std))
    assert abs(find_arch('timm/vit_base_patch16_224').mean[0] - .5) < 1e-6


def test_fastai_loses_what_this_keeps():
    "The same networks by fastai: parameters gone, no network at all, the cut ignored"
    import torchvision.models as tv
    from fastai.vision.learner import create_vision_model
    size = lambda m: sum(p.numel() for p in m.parameters())
    body = size(tv.shufflenet_v2_x0_5()) - size(tv.shufflenet_v2_x0_5().fc)
    assert size(create_vision_model(tv.shufflenet_v2_x0_5, 5, pretrained=False)[0]) < .6 * body
    assert size(create_network('shufflenet_v2_x0_5', 5, weights=None).body) == body
    with pytest.raises(StopIteration): create_vision_model(tv.vit_b_16, 5, pretrained=False)
    assert create_network('resnet18', 5, weights=None, cut=-3).width == 512


def test_wrong_names_and_weights(tmp_path, monkeypatch):
    with pytest.raises(ArchError, match='did you mean resnet18'): create_network('resnet81', 5)
    with pytest.raises(WeightsError, match='another architecture'): create_network('resnet18', 5, weights=find_arch('resnet34').build().state_dict() | {'layer4.1.conv2.weight': torch.zeros(1)})
    with pytest.raises(WeightsError, match='no file'): create_network('resnet18', 5, weights=tmp_path / 'none.pth')
    monkeypatch.setattr(torch.hub, 'load_state_dict_from_url', _offline)
    import torchvision.models._api as api
    monkeypatch.setattr(api, 'load_state_dict_from_url', _offline)
    with pytest.raises(WeightsError, match="resnet18-f37072fd.pth.*weights='path/to/file'"): create_network('resnet18', 5)


def _offline(*args, **kwargs):
    from urllib.error import URLError
    raise URLError('no route to host')
