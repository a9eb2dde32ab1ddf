"""``python -m fmd_ext.lab.training FOLDER``: trains the small model; started again, it goes on where it was stopped."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from fmd_ext.lab.synthetic import split_scenes
from fmd_ext.lab.training.loop import Schedule, Trainer
from fmd_ext.lab.training.model import new_model, new_processor, save_model
from fmd_ext.lab.training.pool import build_pool
from fmd_ext.lab.training.scoring import yes_no_accuracy


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fmd_ext.lab.training", description=__doc__)
    parser.add_argument("folder", type=Path, help="for the clips, the curve, the state and the model")
    parser.add_argument("--steps", type=int, default=2600, help="of the optimizer (%(default)s)")
    parser.add_argument("--clips", type=int, default=4500, help="rendered for training (%(default)s)")
    parser.add_argument("--val-clips", type=int, default=400, help="rendered for validation (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; results depend on it (%(default)s)")
    parser.add_argument("--every", type=int, default=200, help="steps between validations and saved states")
    parser.add_argument("--without-asking", action="store_true", help="never ask which modality a question needs")
    parser.add_argument("--stop-at", type=int, help="stop at this step, to go on later")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.folder.mkdir(parents=True, exist_ok=True)

    processor = new_processor()
    train = build_pool(args.folder / "train", processor, split_scenes("train", args.clips))
    val_scenes = split_scenes("val", args.val_clips)
    val = build_pool(args.folder / "val", processor, val_scenes)
    schedule = Schedule(args.steps, asked=0 if args.without_asking else Schedule.asked)
    trainer = Trainer(new_model(processor, args.seed), processor, train, schedule, args.seed)
    state = args.folder / "state.pt"
    if state.exists():
        trainer.load(state)
        print(f"going on at step {trainer.step}", flush=True)

    start, losses = time.perf_counter(), []
    with open(args.folder / "curve.jsonl", "a") as curve:
        while trainer.step < min(args.steps, args.stop_at or args.steps):
            losses.append(trainer.run_step())
            if trainer.step % 20 == 0:
                line = {"step": trainer.step, "loss": round(sum(losses) / len(losses), 4)}
                line["seconds"] = round(time.perf_counter() - start, 1)
                losses = []
                if trainer.step % args.every == 0 or trainer.step == args.steps:
                    line["accuracy"] = yes_no_accuracy(trainer.model, processor, val, val_scenes)
                    trainer.save(state)
                    save_model(trainer.model, processor, args.folder / "model")
                print(json.dumps(line), file=curve, flush=True)


if __name__ == "__main__":
    main()
