"""What a detector file of an earlier version holds, as the next version would hold it. Plain content in and out."""

import torch

from config import EACH_DIMS
from conformal import conformal_threshold


def from_version_2(content: dict) -> dict:
    """Version 2 had one level, the inverse covariance of a whole image's Gaussian, "made" for metadata, all dimensions
    of a shared Gaussian that "auto" had chosen, and a quantile between two scores as its threshold."""
    density, config = dict(content["density"]), dict(content["config"])
    if config.get("location") == "auto" and density["projection"].shape[1] > EACH_DIMS:
        config["dims"] = density["projection"].shape[1]
    level = {"axes": density.pop("projection", torch.empty(0))}
    level |= {"center": torch.zeros((), dtype=torch.float64), "scale": torch.ones((), dtype=torch.float64)}
    if "precision" in density:  # P = V diag(l) V', so that |diag(l)^1/2 V' x|^2 = x'P x
        values, vectors = torch.linalg.eigh(density["precision"])
        factor = values.clamp(min=0).sqrt()[:, None] * vectors.T
        density = {"mean": density["mean"][None], "factor": factor[None]}
    level |= {f"density.{name}": value for name, value in density.items()}
    levels = {f"0.{name}": value for name, value in level.items()}
    threshold, _ = conformal_threshold(content["normal_scores"], config["false_alarm_rate"])
    return content | {"config": config, "metadata": content["made"], "levels": levels, "threshold": threshold}


def from_version_3(content: dict) -> dict:
    """Version 3 had one network, and four stages of MobileNetV2, the last one with its head convolution."""
    config = dict(content["config"])
    if config.get("backbone") == "mobilenet_v2" and config.get("level"):
        config["level"] = str(config["level"]).replace("4", "5")
    scale = {"center": torch.zeros((), dtype=torch.float64), "scale": torch.ones((), dtype=torch.float64)}
    return content | {"config": config, "members": [{name: content[name] for name in ("network", "levels")} | scale]}
