"""Which architectures can be shipped: a network of random weights is written as a bundle and as ONNX, and both are
asked for the classes of the same images.

`bundle` says whether the network that is built again from the file gives the same probabilities to the bit; `onnx` is
the largest difference of a probability, and `refused` is the error where no ONNX file was written. Each architecture
has the smallest image size that it takes, and runs in a process of its own, since a large one can use up the memory.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from results import Results

# One small network of each family of timm
TIMM = """bat_resnext26ts beit_base_patch16_224 cait_xxs24_224 coat_lite_tiny coatnet_nano_rw_224 convit_tiny
convmixer_768_32 crossvit_tiny_240 cspresnet50 davit_tiny deit_tiny_patch16_224 dla34 dpn48b
ese_vovnet19b_dw resnet10t edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_lite0
efficientvit_m0 efficientvit_b0 eva02_tiny_patch14_224 fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny
ghostnet_050 mixer_s32_224 hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_next_atto inception_v4 levit_128s
mambaout_femto mobilevit_xxs mvitv2_tiny nextvit_small dm_nfnet_f0 pit_ti_224 pvt_v2_b0 regnetx_002
repghostnet_050 repvit_m0_9 res2net50_26w_4s resnest14d rexnet_100 legacy_seresnet18 selecsls42b skresnet18
starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 tiny_vit_5m_224 twins_svt_small visformer_tiny
volo_d1_224 xception41 xcit_nano_12_p16_224 mobilenetv3_small_050 vit_tiny_patch16_224 convnext_atto""".split()


def architectures():
    "All classifiers of torchvision, and one of each family of timm"
    from ftlib.models.arch import torchvision_names
    return [*torchvision_names(), *(f"timm:{name}" for name in TIMM)]


def photographs(folder):
    "20 images of coloured noise in two classes, wide and tall, as PNG and JPEG"
    rng = np.random.default_rng(0)
    for label, colour in (("red", 0), ("blue", 2)):
        (folder / label).mkdir(parents=True)
        for i in range(10):
            pixels = rng.integers(0, 120, (40 + 7 * i, 90 - 5 * i, 3), dtype=np.uint8)
            pixels[..., colour] += 100
            Image.fromarray(pixels).save(folder / label / f"{i}.{'jpg' if i % 2 else 'png'}")
    return folder


def untrained(photographs, arch):
    "A learner with random weights, over the smallest images that the architecture takes"
    from fastai.metrics import accuracy

    from ftlib import ArchError, image_data, vision_learner
    more = dict(image_size=64 if arch.endswith("32") else 112) if arch.startswith("vit_") else {}
    for size in more.values() or (64, 128, 224, 240, 256):
        dls = image_data(photographs, size=size, bs=4, valid=.4, num_workers=0, seed=0)
        try: return vision_learner(dls, arch.removeprefix("timm:"), weights=None, metrics=accuracy, seed=0, **more)
        except ArchError as e: error = e
    raise error


def shipped(arch, folder):
    "What became of one architecture"
    from ftlib import ArchError, DeployError, as_predictor, load_bundle
    from ftlib.deploy.onnx import write_onnx
    images, row = photographs(folder / "images"), dict(bundle=None, onnx=None, refused=None)
    try: learn = untrained(images, arch)
    except ArchError as e: return row | dict(refused=str(e))
    row |= dict(size=learn.dls.size, parameters=sum(p.numel() for p in learn.model.parameters()))
    ours = as_predictor(learn)
    again = load_bundle(learn.bundle(folder / "net.ftl"))
    first, second = (m.predict_images(images, top=2, progress=False) for m in (ours, again))
    row["bundle"] = first.equals(second) and bool(first.probability.notna().all())
    try: table = write_onnx(ours, folder / "net.onnx", sorted(images.glob("*/*"))[::3])
    except DeployError as e: return row | dict(refused=" ".join(str(e).split())[:300])
    return row | dict(onnx=float(table.difference.max()), changed=int((table["class"] != table["class in ONNX"]).sum()))


def _answer(pipe, arch, folder):
    "In a process of its own: send the row, and end without waiting for what libraries have started"
    pipe.send(shipped(arch, Path(folder)))
    pipe.close()
    os._exit(0)


def in_own_process(arch, seconds):
    "The row of an architecture; one that does not come in time, or dies, has the reason"
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_answer, args=(theirs, arch, folder))
        process.start()
        theirs.close()
        try: row = ours.recv() if ours.poll(seconds) else dict(refused=f"not done after {seconds} seconds")
        except EOFError:
            process.join()
            row = dict(refused=f"the process ended with code {process.exitcode}")
        process.kill()
        process.join()
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", help="by default all classifiers of torchvision, and one of each family "
                        "of timm as timm:name")
    parser.add_argument("--seconds", type=float, default=900, help="time for one of them")
    parser.add_argument("--out", type=Path, default=Path("runs") / "shipping.csv")
    args = parser.parse_args()
    results = Results(args.out, "arch")
    for arch in args.archs or architectures():
        if results.has(arch): continue
        start = time.perf_counter()
        row = in_own_process(arch, args.seconds)
        results.add(arch=arch, **row, seconds=time.perf_counter() - start)
    table = results.table
    print(f"{table.bundle.eq(True).sum()} of {len(table)} give the same answers from a bundle; "
          f"{table.onnx.notna().sum()} from ONNX")


if __name__ == "__main__": main()
