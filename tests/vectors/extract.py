"""Cut recorded traces into the files of this folder, one per optimizer or one for the schedules.

    python extract.py TRACES.npz  OUT [--suffix _exact]
    python extract.py SCHEDULES.json OUT

An .npz file of traces gives OUT/<stem><suffix>.npz for each optimizer in OPTIMIZERS; a .json file
of scheduler traces gives OUT/schedules.json with the schedulers in SCHEDULERS. The same source
gives the same bytes with the same Python, NumPy and zlib. See README.md for the keys.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

# torch's class name -> stem of the rule, the reference and the vector file.
OPTIMIZERS = {
    name: name.lower()
    for name in (
        "SGD",
        "Adam",
        "AdamW",
        "Adadelta",
        "Adamax",
        "RAdam",
        "RMSprop",
        "Adagrad",
        "Rprop",
        "NAdam",
        "ASGD",
        "Adafactor",
        "Muon",
    )
}
SCHEDULERS = (
    "StepLR",
    "MultiStepLR",
    "ConstantLR",
    "LinearLR",
    "ExponentialLR",
    "CosineAnnealingLR",
    "PolynomialLR",
    "LambdaLR",
    "MultiplicativeLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "OneCycleLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "ChainedScheduler",
    "SWALR",
)


def extract_optimizers(source: Path, out: Path, suffix: str) -> list[Path]:
    """Write one file per optimizer, keys in the source's order after `index`."""
    written = []
    with np.load(source, allow_pickle=False) as traces:
        index = json.loads(traces["index"].tobytes())
        for optimizer, stem in OPTIMIZERS.items():
            cases = [case for case in index if case["optimizer"] == optimizer]
            if not cases:
                raise SystemExit(f"extract: {source.name} must hold cases of {optimizer}, found none")
            names = {case["name"] for case in cases}
            arrays = {"index": np.frombuffer(json.dumps(cases).encode(), np.uint8)}
            arrays |= {key: traces[key] for key in traces.files if key.split("/", 1)[0] in names}
            path = out / f"{stem}{suffix}.npz"
            np.savez_compressed(path, **arrays)
            written.append(path)
    return written


def extract_schedules(source: Path, out: Path) -> list[Path]:
    """Write schedules.json: the source's header, and the cases of SCHEDULERS, one per line."""
    traces = json.loads(source.read_text("utf-8"))
    cases = [case for case in traces["cases"] if case["spec"][0] in SCHEDULERS]
    missing = set(SCHEDULERS) - {case["spec"][0] for case in cases}
    if missing:
        raise SystemExit(f"extract: {source.name} must hold cases of {', '.join(sorted(missing))}, found none")
    header = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in traces.items() if key != "cases"]
    lines = ",\n".join(json.dumps(case) for case in cases)
    path = out / "schedules.json"
    path.write_text("{" + ",\n".join([*header, f'"cases": [\n{lines}\n]']) + "}\n", "utf-8")
    return [path]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("source", type=Path, help="recorded traces: optimizers (.npz) or schedules (.json)")
    parser.add_argument("out", type=Path, help="folder to write to; made if missing")
    parser.add_argument("--suffix", default="", help="appended to the stem of each .npz file, for instance _exact")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.source.suffix == ".json":
        written = extract_schedules(args.source, args.out)
    else:
        written = extract_optimizers(args.source, args.out, args.suffix)
    for path in written:
        print(f"{path} {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
