"""Write a finished detector as an ONNX graph, for computers without torch, and check that it decides the same.

    python export.py models/bottle.pt                        models/bottle.onnx and models/bottle.json
    python export.py models/bottle.pt --output line/bottle.onnx --int8
    python export.py --check line/bottle.onnx                the file, and what this machine makes of it; without torch
    python export.py --check line/bottle.onnx models/bottle.pt photos

The graph goes from pixels, images (B, H, W, 3) uint8 at the detector's --size, to the decision: scores, p_values and,
of a patch model, maps in the score's unit. An image is anomalous where p_value <= rate, which the .json says with all
else that a reader needs: how to resize, threshold, unit, calibration scores, versions. Grad-CAM is not in the graph.
For the panels of predict.py --explain the graph also gives what normal images are compared by, and the detector's
.normals file comes to lie beside: where the network runs far enough for the score alone, or with --explain 1.

Both score real images before anything is written: the normal training images in --data_dir, those in the .normals file
beside the detector, or the IMAGES that are named. If a score or a map differs by more than 1e-4, relative to the score
or to the threshold where that is larger, or if a decision differs, nothing is written and the exit code is 1.

--half and --int8 change scores: differences, time, and AUROC where --data_dir has labelled images are told, and
--accept is needed where a decision changes. For --int8 densities and threshold are fitted anew, to what the networks
give in int8: the training images must be in --data_dir.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from runtime.cli import check_usage, int_at_least, int_within, new_parser, progress_bar, run_script, zero_or_one
from runtime.files import InputError, print_line, say, write_files

OPSETS = 18, 25  # of ONNX, that torch's exporter writes


def get_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.usage = (
        "%(prog)s DETECTOR [IMAGES ...] [flags]\n       %(prog)s --check FILE.onnx [DETECTOR [IMAGES ...]] [flags]"
    )
    words = "a detector file; then images or folders that are compared (default: the training images)"
    parser.add_argument("paths", nargs="*", metavar="PATH", help=words)
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="FILE", help="the .onnx file; the .json lies beside it (default: beside the detector)")
    add("--opset", type=int_within(*OPSETS), default=18, metavar="N", help="version of ONNX's operators (default: 18)")
    add("--half", action="store_true", help="compute the networks in float16, for processors that can")
    add("--int8", action="store_true", help="compute the networks in int8, in the ranges that normal images show")
    add("--accept", action="store_true", help="with --half or --int8: write the file although decisions change")
    explain = "give what predict.py --explain needs (default: 1 if normal images lie beside and it is almost free)"
    add("--explain", type=zero_or_one, metavar="0|1", help=explain)
    add = parser.add_argument_group("check").add_argument
    add("--check", metavar="FILE", help="an .onnx file that is checked instead, against DETECTOR if it is given")
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", default="Data", metavar="DIR", help="folder of the categories (default: Data)")
    workers = "threads that decode images (default: one per core, 16 at most)"
    add("--workers", type=int_at_least(0), default=min(16, os.cpu_count() or 1), metavar="N", help=workers)
    threads = "threads of torch and of ONNX Runtime (default: 0, as many as there are cores)"
    add("--threads", type=int_at_least(0), default=0, metavar="N", help=threads)
    return parser


def check_words(args: argparse.Namespace) -> None:
    """Raise ArgumentTypeError for words and flags that do not go together."""
    if not args.paths and not args.check:
        raise argparse.ArgumentTypeError("a detector file is needed, or --check FILE.onnx")
    if args.paths and not args.paths[0].endswith(".pt"):
        raise argparse.ArgumentTypeError(f"{args.paths[0]}: a detector file (.pt) comes first, which images go through")
    if args.half and args.int8:
        raise argparse.ArgumentTypeError("--half or --int8, not both")
    if args.int8 and len(args.paths) > 1:
        raise argparse.ArgumentTypeError("--int8 takes no images: it needs the training images, in --data_dir")
    if args.accept and not (args.half or args.int8):
        raise argparse.ArgumentTypeError("--accept goes with --half or --int8: float32 must decide the same")
    if args.check and (args.output or args.half or args.int8 or args.explain is not None):
        raise argparse.ArgumentTypeError("--check writes nothing: no --output, --half, --int8, --explain")
    for path in filter(None, (args.output, args.check)):
        if not path.endswith(".onnx"):
            raise argparse.ArgumentTypeError(f"{path}: the name of an .onnx file is needed")


if __name__ == "__main__":
    check_usage(get_parser(), check_words)


def main(args: argparse.Namespace) -> None:
    check_words(args)
    if args.check:
        check(args)
    else:
        export(args)


# Checking ---------------------------------------------------------------------------------------------------------


def check(args: argparse.Namespace) -> None:
    """Check an exported file, against its detector if that is named. Raises InputError if something is wrong."""
    from prediction.exported import PRECISIONS, Exported

    exported = Exported.open(args.check, args.threads)
    facts, allowed = exported.facts, PRECISIONS[exported.facts["precision"]]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print_line(f"{args.check}: {exported.category}, {facts['precision']}, digests agree; written by {versions}")
    difference = exported.probe_difference()
    if not difference <= allowed:
        what = f"its scores of test patterns are off by {difference:.2g} on this machine, relatively"
        raise InputError(f"{args.check}: {what}; allowed: {allowed:g}; take another version of onnxruntime")
    same = "scores of test patterns are those of the exporting machine"
    print_line(f"{args.check}: {same}; largest difference {difference:.2g}")
    if not args.paths:
        return
    detector = load_detector(args)
    check_same(exported, detector, args.paths[0])
    comparison = compared(args, detector, exported, load_pictures(args, detector))
    if facts["precision"] == "float32" and not comparison.fits:
        raise InputError(f"{args.check}: does not say what {args.paths[0]} says: {comparison.words()}")


def check_same(exported, detector, path: str) -> None:
    """Raise InputError if a file was exported from another detector than that of a path."""
    from prediction.exported import digest

    for name, own, other in (
        ("category", exported.category, detector.config.category),
        ("size", "{1}x{0}".format(*exported.size), "{1}x{0}".format(*detector.config.size)),
        ("sha256", exported.facts["detector"], digest(Path(path).read_bytes())),
    ):
        if own != other:
            differ = f"was exported from another detector than {path}: {name} {own}, not {other}"
            raise InputError(f"{exported.path}: {differ}; export that one, or name the right one")


# Exporting --------------------------------------------------------------------------------------------------------


def export(args: argparse.Namespace) -> None:
    """Write the files of a detector, if they decide as it does."""
    path = Path(args.output or Path(args.paths[0]).with_suffix(".onnx"))
    check_replaced(path)
    say("loading torch and the detector")
    from normals import normals_path
    from prediction.exported import Exported
    from prediction.exporting import check_packages, described, facts_of, graph_of

    check_packages()
    detector = load_detector(args)
    normals = kept_normals(args, detector, normals_path(path))
    normals_digest = normals.digest if normals else None
    images = load_pictures(args, detector)
    say(f"{detector.config.category}: tracing the graph, which takes half a minute for each network")
    graph = graph_of(detector, args.opset, bool(normals))
    facts = facts_of(detector, Path(args.paths[0]).read_bytes(), normals=normals_digest)
    exported = opened(args, path, graph, facts)
    comparison = compared(args, detector, exported, images)
    if not comparison.fits:
        raise InputError(f"{path}: not written: the graph does not say what {args.paths[0]} says: {comparison.words()}")
    if args.half or args.int8:
        graph, facts = smaller(args, detector, graph, images, normals_digest)
        exported = opened(args, path, graph, facts)
        changed = compared(args, detector, exported, images).changed + tell_labelled(args, detector, exported)
        if changed and not args.accept:
            what = f"{facts['precision']} changes {changed} decisions"
            raise InputError(f"{path}: not written: {what}; --accept writes it anyway")
    contents = {path: graph, path.with_suffix(".json"): described(facts, graph, exported)}
    contents |= {normals_path(path): normals.content()} if normals else {}
    write_files(contents)
    Exported.open(path, args.threads)
    names, size = ", ".join(other.name for other in [*contents][1:]), sum(map(len, contents.values())) / 1e6
    say(f"{path}, {names}: {size:.1f} MB; Grad-CAM is not in the graph")


def opened(args: argparse.Namespace, path: Path, graph: bytes, facts: dict):
    """Return a graph that is not written yet, in ONNX Runtime."""
    from prediction.exported import Exported, open_session

    exported = Exported(path, open_session(path, graph, args.threads), facts)
    exported.check()
    return exported


def kept_normals(args: argparse.Namespace, detector, target: Path):
    """Return the normal images beside the detector that panels are to show, None if they are not. target: the path
    that they are written to. Raises InputError if they are asked for and not right, or would replace another file."""
    from normals import ANEW, load_normals, normals_path, read_normals
    from prediction.exporting import explains_free

    beside = normals_path(args.paths[0])
    wanted = args.explain
    if wanted is None and beside.is_file() and not (wanted := explains_free(detector)):
        say(f"{beside.name} is left out: for predict.py --explain the network must run further, see --explain 1")
    if not wanted:
        return None
    normals = load_normals(beside, detector, way_out=f"{ANEW}, or leave it out with --explain 0")
    check_own(target, read_normals)
    other = target.with_suffix(".pt")
    if target.exists() and other.exists() and read_normals(target)[0].get("detector") != normals.digest:
        raise InputError(f"{target}: would be replaced, and may be that of {other.name}; take another --output")
    return normals


def smaller(args: argparse.Namespace, detector, graph: bytes, images, normals: str | None) -> tuple[bytes, dict]:
    """Return the graph that --half or --int8 asks for, and its facts. normals: see ``facts_of``."""
    from prediction.exporting import (
        INT8_NEEDS,
        calibration_batches,
        facts_of,
        fitted_to_int8,
        graph_of,
        in_half_precision,
        in_int8,
    )

    source, category = Path(args.paths[0]).read_bytes(), detector.config.category
    if args.half:
        return in_half_precision(graph), facts_of(detector, source, "float16", normals)
    if len(images) < INT8_NEEDS:
        raise InputError(f"{category}: {len(images)} training images, --int8 needs {INT8_NEEDS} to know what is normal")
    say(f"{category}: fitting the densities to what int8 makes of the training images")
    refitted = fitted_to_int8(detector, images, args.threads)
    batches = (batch.permute(0, 2, 3, 1).contiguous().numpy() for batch in calibration_batches(images))
    graph = graph_of(refitted, args.opset, normals is not None)
    return in_int8(graph, batches), facts_of(refitted, source, "int8", normals)


def check_replaced(path: Path) -> None:
    """Raise InputError if what would be replaced was not written by this script."""
    from prediction.exported import read_facts

    facts = path.with_suffix(".json")
    check_own(facts, read_facts)
    if path.exists() and not facts.exists():
        raise InputError(f"{path}: is there already, without the .json of this script; take another --output")


def check_own(path: Path, read: Callable[[Path], object]) -> None:
    """Raise InputError if a file would be replaced that is none which ``read`` takes."""
    if path.exists():
        try:
            read(path)
        except InputError as error:
            raise InputError(f"{error}; it would be replaced: move it away, or take another --output") from error


# Both -------------------------------------------------------------------------------------------------------------


def load_detector(args: argparse.Namespace):
    """Return the detector, on the CPU. Raises InputError if it decides nothing."""
    import torch

    from detector import load

    if args.threads:
        torch.set_num_threads(args.threads)
    detector = load(args.paths[0])
    if not len(detector.calibration_scores):
        raise InputError(f"{args.paths[0]}: has no threshold, and so decides nothing; train it again")
    return detector


def load_pictures(args: argparse.Namespace, detector):
    """Return the images (N, 3, H, W) uint8 that graph and detector score. Raises InputError if there are none."""
    import torch

    from dataset import files_digest, load_images, train_paths
    from normals import load_normals, normals_path
    from prediction.inputs import list_paths

    config, beside = detector.config, normals_path(args.paths[0])
    for word in args.paths[1:]:
        if word != "-" and not os.path.lexists(word):
            raise InputError(f"{word}: no such file or folder")
    if len(args.paths) > 1:
        paths = list(map(Path, list_paths(args.paths[1:])))
        if not paths:
            raise InputError(f"{', '.join(args.paths[1:])}: no image found")
    elif (Path(args.data_dir) / config.category / "train").is_dir():
        paths = train_paths(args.data_dir, config.category)
        if args.int8 and detector.train_files not in ("", files_digest(paths)):
            others = f"{Path(args.data_dir) / config.category}: not the training images that it was made from"
            raise InputError(f"{args.paths[0]}: {others}, which --int8 needs; name their --data_dir")
    elif args.int8:
        needed = f"--int8 needs the training images; {Path(args.data_dir) / config.category} has none"
        raise InputError(f"{args.paths[0]}: {needed}: name their --data_dir")
    elif beside.is_file():
        normals = load_normals(beside, detector)
        arrays = [torch.from_numpy(normals.image(number)) for number in range(len(normals.names))]
        return torch.stack(arrays).permute(0, 3, 1, 2).contiguous()
    else:
        nowhere = f"no training images in {Path(args.data_dir) / config.category} nor in {beside}"
        raise InputError(f"{nowhere}; name --data_dir, or images to compare")
    return load_images(paths, config.size, args.workers, white=detector.white)


def compared(args: argparse.Namespace, detector, exported, images):
    """Return how graph and detector differ on images, and print it, with the time that they take."""
    from prediction.exporting import compare, speeds

    category = detector.config.category
    with progress_bar(category, 0, len(images), True, "image") as bar:
        comparison = compare(detector, exported, images, bar.update)
    ours, theirs = speeds(detector, exported, images[0])
    print_line(f"{category}: {exported.facts['precision']}: {comparison.words()}")
    print_line(f"{category}: {ours:.1f} ms an image in ONNX Runtime, {theirs:.1f} ms in torch, one at a time")
    return comparison


def tell_labelled(args: argparse.Namespace, detector, smaller) -> int:
    """Print the AUROC of a detector and of a graph with smaller weights, if there are labelled images, and return how
    many decisions differ on those."""
    from dataset import has_test_images, load_test
    from prediction.exporting import compare
    from reporting.metrics import auroc

    config = detector.config
    if not has_test_images(args.data_dir, config.category):
        return 0
    test = load_test(args.data_dir, config.category, config.size, args.workers, white=detector.white)
    comparison = compare(detector, smaller, test.images, lambda count: None)
    print_line(f"{config.category}: labelled images: {comparison.words()}")
    if len({*test.labels.tolist()}) > 1:
        before, after = (auroc(test.labels, scores) for scores in comparison.all_scores())
        print_line(f"{config.category}: image AUROC {before:.4f}, in {smaller.facts['precision']} {after:.4f}")
    return comparison.changed


if __name__ == "__main__":
    run_script(main, get_parser())
