"""Compare this project's densities with anomalib's PaDiM and PatchCore: same weights, images, size, machine.

    python -m venv peers && peers/bin/pip install -r requirements.txt anomalib
    peers/bin/python benchmarks/peers.py --data_dir Data --weights mobilenet_v2-features.pth

Needs an environment of its own, with anomalib 2.7 or newer beside requirements.txt. The network is MobileNetV2 from
ImageNet, as it is; images are of 256 px. anomalib's models come as they are: PaDiM with stages of strides 4, 8 and 16
and 100 random dimensions, PatchCore with strides 8 and 16 and --keep of the windows. Prints figures as each model is
done, and adds them as a row to results/peers.csv. Times are CPU time of this process with one thread, so that other
processes matter little: fit_seconds of fitting to the training images, which are in memory; image_ms of scoring a test
image, in batches of 4.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from config import JOINED_WINDOW, Config, PatchConfig  # noqa: E402
from dataset import TestSet, load_masks, load_test, load_train  # noqa: E402
from detector import Detector, initial_network  # noqa: E402
from reporting.metrics import image_metrics, pixel_metrics  # noqa: E402
from runtime.cli import command_line, device_name, new_parser, number, run_script  # noqa: E402
from runtime.files import InputError  # noqa: E402

SIZE = (256, 256)
BACKBONE = "mobilenet_v2"
TIMM_NAME, STAGES = "mobilenetv2_100", {4: "blocks.1", 8: "blocks.2", 16: "blocks.4"}  # by stride
MEAN, DEVIATION = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
FIT_BATCH, SCORE_BATCH = 16, 4
Scored = tuple[float, float, Tensor, Tensor]  # fit_seconds, image_ms, scores (M,), maps (M, H, W)


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--data_dir", default="Data", metavar="DIR", help="folder of the categories (default: Data)")
    add("--type", default="bottle,screw,grid", metavar="NAMES", help="categories (default: bottle,screw,grid)")
    add("--weights", required=True, metavar="FILE", help="ImageNet weights of MobileNetV2")
    add("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS), metavar="NAME", help=", ".join(MODELS))
    add("--keep", type=number(1e-4, 1), default=0.01, metavar="X", help="share of PatchCore's windows (default: 0.01)")
    add("--results", default=ROOT / "results/peers.csv", type=Path, metavar="FILE", help="(default: results/peers.csv)")
    return parser


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    for category in args.type.split(","):
        train, test = load_train(args.data_dir, category, SIZE, 1), load_test(args.data_dir, category, SIZE, 1)
        masks = load_masks(test, SIZE, 1).numpy()
        for model in args.models:
            fit_seconds, image_ms, scores, maps = MODELS[model](args, category, train.images, test)
            known = test.known(masks)
            figures = image_metrics(test.labels, scores.numpy()) | pixel_metrics(masks[known], maps.numpy()[known])
            row = {"category": category, "model": model, "train_images": len(train.images)}
            row |= {name: figures[name] for name in ("image_auroc", "pixel_auroc", "aupro")}
            row |= {"fit_seconds": round(fit_seconds, 1), "image_ms": round(image_ms, 1), "threads": 1}
            row |= {
                "keep": args.keep if model == "anomalib PatchCore" else "",
                "device": device_name(torch.device("cpu")),
            }
            row |= {"torch": str(torch.__version__), "anomalib": version(), "date": str(datetime.date.today())}
            row |= {"command": command_line().replace("python ", "python benchmarks/", 1)}
            print({name: row[name] for name in list(row)[:8]}, flush=True)
            from tables import append  # and pandas with it

            append(row, args.results)


def version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("anomalib")
    except PackageNotFoundError:
        raise InputError("anomalib is not installed here; see the top of benchmarks/peers.py") from None


@torch.inference_mode()
def timed(fit: Callable[[], object], score: Callable[[Tensor], tuple[Tensor, Tensor]], test: TestSet) -> Scored:
    """Return what ``score`` says of all test images, and the CPU time that this and ``fit`` took."""
    began = time.process_time()
    fit()
    fitted = time.process_time()
    scores, maps = zip(*(score(batch) for batch in test.images.split(SCORE_BATCH)))
    image_ms = 1000 * (time.process_time() - fitted) / len(test.images)
    return fitted - began, image_ms, torch.cat(scores), torch.cat(maps)


# This project -----------------------------------------------------------------------------------------------------


def this_project(args: argparse.Namespace, category: str, images: Tensor, test: TestSet, density: str) -> Scored:
    """Fit a pretrained patch model as it is, by the defaults but for the density."""
    settings = {"join": True, "normalize": "imagenet", "epochs": 0, "weights": args.weights}
    patches = PatchConfig(64, window=JOINED_WINDOW)
    config = Config(category, backbone=BACKBONE, density=density, patches=patches, **settings)
    detector = Detector(config, [initial_network(config)])
    return timed(lambda: detector.fit(images), detector, test)


# anomalib ---------------------------------------------------------------------------------------------------------


def anomalib(args: argparse.Namespace, category: str, images: Tensor, test: TestSet, kind: str) -> Scored:
    """Fit a model of anomalib as its own training does, without the framework around it."""
    version()
    torch.manual_seed(0)
    if kind == "padim":
        from anomalib.models.image.padim.torch_model import PadimModel

        model = PadimModel(TIMM_NAME, [*STAGES.values()], pre_trained=False, n_features=100)
    else:
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel

        model = PatchcoreModel([STAGES[8], STAGES[16]], TIMM_NAME, pre_trained=False)
    load_in_order(model.feature_extractor, args.weights)

    def fit() -> None:
        model.train()
        model.feature_extractor.eval()
        for batch in images.split(FIT_BATCH):
            model(normalized(batch))
        model.fit() if kind == "padim" else model.subsample_embedding(args.keep)
        model.eval()

    def score(batch: Tensor) -> tuple[Tensor, Tensor]:
        output = model(normalized(batch))
        return output.pred_score.flatten(), output.anomaly_map.reshape(len(batch), *SIZE)

    return timed(fit, score, test)


def normalized(images: Tensor) -> Tensor:
    """Return images (B, 3, H, W) uint8 as ImageNet's networks take them."""
    return (images.float() / 255 - MEAN) / DEVIATION


def load_in_order(network: torch.nn.Module, path: str) -> None:
    """Load weights whose names differ but not their order. Raises InputError if shapes differ."""
    weights = [value for name, value in torch.load(path, weights_only=True).items() if "num_batches" not in name]
    state = network.state_dict()
    for name, value in zip([name for name in state if "num_batches" not in name], weights):
        if state[name].shape != value.shape:
            raise InputError(f"{path}: no weights of {TIMM_NAME}: {name} has another shape")
        state[name] = value
    network.load_state_dict(state)


MODELS = {
    "anomalib PaDiM": lambda *given: anomalib(*given, "padim"),
    "both": lambda *given: this_project(*given, "both"),
    "nearest": lambda *given: this_project(*given, "nearest"),
    "torch": lambda *given: this_project(*given, "torch"),
    "anomalib PatchCore": lambda *given: anomalib(*given, "patchcore"),
}


if __name__ == "__main__":
    run_script(main, get_parser())
