"""Every family of timm at several sizes: is a network built for images of that size, and what does it say if not?

A family is a module of timm (`timm.list_modules()`), and its smallest network stands for it, with random weights. It is
built by its name for images of `--sizes` pixels, one network at a time, and two images go through it, stages and head.
`outcome` is 'works', the class of ftlib's error with its message, or 'failure': an exception of another library, or an
output of another shape. A row is written as each ends; what is there already is not run again.
"""

import argparse
import time
import warnings
from collections import defaultdict
from pathlib import Path

import pandas as pd
import torch
from results import Results

from ftlib import ArchError, WeightsError, create_network
from ftlib.models.arch import find_arch, timm_names
from ftlib.models.image_size import size_arguments
from ftlib.system.memory import release_memory

# The network with the fewest parameters in each module, or one of the smallest; of other modules, the first
SMALLEST = """
beit_base_patch16_224 cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 convnext_zepto_rms cpubone_nano
crossvit_tiny_240 cs3darknet_focus_s csatv2 cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224
densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1
efficientvit_b0 efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 gmlp_ti16_224 halonet_h1 hardcorenas_a hgnetv2_b0
hiera_tiny_224 hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnet_035 lcnetv2_small legacy_seresnet18 legacy_xception levit_128s lowformer_b0 mambaout_femto
maxvit_pico_rw_256 mobilenetv2_035 mobilenetv5_base mobileone_s1 mobilevit_xxs mvitv2_tiny
naflexvit_base_patch16_parfac_gap nasnetalarge nest_tiny nextvit_small nf_regnet_b0 pit_xs_224 pnasnet5large
poolformerv2_s12 pvt_v2_b0 qwen3_vit_416m rdnet_tiny regnetx_002 repghostnet_050 repvit_m0_9 res2next50
resnest14d resnet10t resnetv2_18 rexnet_150 sam2_hiera_tiny samvit_base_patch16_224 selecsls42 sequencer2d_s
shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224
swinv2_tiny_window8_256 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11 visformer_tiny
vit_relpos_small_patch16_rpn_224 vit_small_r26_s32_224 vit_tiny_patch16_224 vitamin_small_224 volo_d1_224
xception41p xcit_nano_12_p8_224""".split()


def families():
    "Name of the smallest network by module of timm"
    from timm.models import _registry
    members = defaultdict(list)
    for name in timm_names(): members[_registry._model_to_module[name]].append(name)
    known = {_registry._model_to_module.get(name): name for name in SMALLEST}
    return {family: known.get(family, next((n for n in names if not n.startswith("test_")), names[0]))
            for family, names in members.items()}


def built(name, size, n_in=3):
    "Build a network for a size and run it on two images: what a row holds"
    arch = find_arch(f"timm/{name}")
    try:
        net = create_network(f"timm/{name}", 3, weights=None, n_in=n_in, input_size=size).eval()
        with torch.inference_mode(): out = net(torch.rand(2, n_in, size, size))
    except (ArchError, WeightsError) as e: return dict(outcome=type(e).__name__, message=" ".join(str(e).split()))
    except Exception as e:
        return dict(outcome="failure", message=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}")
    if tuple(out.shape) != (2, 3) or not out.isfinite().all():
        return dict(outcome="failure", message=f"output {tuple(out.shape)}")
    how = " ".join(f"{k}={v}" for k, v in (size_arguments(arch, size) or {}).items())
    return dict(outcome="works", message=how and f"built with {how}", stages=len(net.stages),
                parameters=sum(p.numel() for p in net.parameters()))


def summary(table):
    "Networks by size and outcome"
    return table.pivot_table(index="size", columns="outcome", values="family", aggfunc="count", fill_value=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", help="modules of timm; by default all")
    parser.add_argument("--sizes", nargs="+", type=int, default=[96, 160, 200, 224], help="pixels per side")
    parser.add_argument("--out", type=Path, default=Path("runs") / "timm_sizes.csv",
                        help="the table; what it holds already is not run again")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    results, smallest = Results(args.out, "family", "size"), families()
    for family in args.families or smallest:
        for size in args.sizes:
            if results.has(family, size): continue
            start = time.perf_counter()
            found = built(smallest[family], size)
            release_memory()  # some networks have hundreds of millions of weights
            own = find_arch(f"timm/{smallest[family]}")
            results.add(family=family, network=smallest[family], own_size=_own_size(own.name), size=size,
                        **dict(stages=None, parameters=None) | found, seconds=time.perf_counter() - start)
    table = results.table
    print(summary(table).to_string())
    rest = table[table.outcome != "works"]
    with pd.option_context("display.max_colwidth", 200): print(rest[["network", "size", "message"]].to_string())


def _own_size(name):
    import timm
    return timm.get_pretrained_cfg(name).input_size[-1]


if __name__ == "__main__": main()
