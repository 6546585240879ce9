"""Times whole training steps on random tokens: python bench/step_time.py [steps], settings as for train_gpt.py

    PRESET=peer7 python bench/step_time.py 10
    PRESET=peer7 TRAIN_BATCH_TOKENS=131072 TRAIN_SEQ_LEN=2048 PROFILE=trace.txt python bench/step_time.py 30

Prints the time to the first step, the median step, tokens per second and the peak memory, as one JSON line. PROFILE
names a file for a table of the GPU time by kernel.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t


class RandomBatches:
    """Stands in for the data: the same random tokens every step."""

    def __init__(self, settings: t.Settings, ranks: t.Ranks):
        sequences = settings.train_batch_tokens // settings.train_seq_len // ranks.world_size
        self.tokens = torch.randint(
            0, settings.vocab_size, (sequences, settings.train_seq_len + 1), device=ranks.device
        )

    def next(self):
        return self.tokens[:, :-1], self.tokens[:, 1:]


def main() -> None:
    started = time.perf_counter()
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    profile = os.environ.pop("PROFILE", "")
    settings, _, ranks = t.prepare_run(dict(os.environ))
    torch.manual_seed(0)
    model = t.build_model(settings, ranks)
    micro_batch = t.choose_micro_batch(settings, ranks)
    trainer = t.Trainer(model, settings, ranks, micro_batch, 16e6, lambda text: None)
    trainer.log.progress = lambda text: None
    trainer.warm_up()
    first = time.perf_counter() - started
    batches = RandomBatches(settings, ranks)

    def step() -> None:
        trainer._gradients(*batches.next(), model.order(recurrent=True))
        trainer.optimizers.step(1.0, settings.muon_momentum)
        trainer.steps_done += 1
        trainer.average.update(trainer.steps_done, 0.5, trainer.optimizers.muon.found_inf)

    times = []
    for _ in range(3):
        step()
    for _ in range(steps):
        torch.cuda.synchronize()
        mark = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - mark)
    if profile and ranks.rank == 0:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            step()
            torch.cuda.synchronize()
        Path(profile).write_text(
            trace.key_averages().table(sort_by="cuda_time_total", row_limit=60, max_name_column_width=90)
        )
    if ranks.rank == 0:
        median = statistics.median(times)
        print(
            json.dumps(
                {
                    "preset": settings.preset, "batch_tokens": settings.train_batch_tokens, "seq_len": settings.train_seq_len,
                    "micro_batch": micro_batch, "world_size": ranks.world_size, "device": torch.cuda.get_device_name(),
                    "torch": torch.__version__, "first_step_s": round(first, 1), "step_ms": round(1000 * median, 2),
                    "fastest_ms": round(1000 * min(times), 2), "tokens_per_s": round(settings.train_batch_tokens / median),
                    "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
                    "predicted_activations_GB": round(t.activation_bytes(settings, micro_batch) / 1e9, 1),
                }
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
