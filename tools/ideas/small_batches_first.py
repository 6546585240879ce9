"""Idea: half the batch while rates are high. An --idea of `python -m tools.explore`.

A step of fewer tokens is noisier, which costs little while the model is far from its goal, and
twice as many of them fit into the same tokens. Until SMALL of the run is over, a step has half of
TRAIN_BATCH_TOKENS, so this part of the run makes twice the steps. In a run by steps, ITERATIONS
counts whole batches.
"""

SMALL = 0.4  # of the run


def halving(kind: type) -> type:
    """Batches, of this kind, of which the first come in two halves."""

    class Batches(kind):
        """small says whether halves are wanted; the trainer changes it."""

        small = True
        halves = ()

        def next(self):
            """The next batch, or half of one."""
            if not self.small:
                self.halves = ()
                return super().next()
            if not self.halves:
                tokens, targets = super().next()
                half = len(tokens) // 2
                self.halves = [(tokens[half:], targets[half:]), (tokens[:half], targets[:half])]
            return self.halves.pop()

    return Batches


def whole_steps(step: int, iterations: int) -> float:
    """How many whole batches `step` steps took, the first of them of halves."""
    first = 2 * SMALL * iterations
    return step / 2 if step < first else step - first / 2


def taking_halves(script) -> type:
    """The script's Trainer, which trains on batches of two sizes."""

    class Trainer(script.Trainer):
        """Counts a small step as half of one, where ITERATIONS ends the run."""

        def run(self, batches, validate):
            """As the script's; tells batches which part of the run it is."""
            inner = script.schedule_at
            graphed = self.graphed_steps

            def schedule_at(settings, step, seconds):
                now = inner(settings, whole_steps(step, settings.iterations), seconds)
                batches.small = now.progress < SMALL
                return now

            def step(kind, tokens, targets, *rates):
                return graphed((*kind, len(tokens)), tokens, targets, *rates)

            step.release = graphed.release
            script.schedule_at = schedule_at
            self.graphed_steps = step
            try:
                super().run(batches, validate)
            finally:
                script.schedule_at = inner

        def accumulate_gradients(self, kind, *others):
            """Of a step whose kind names its number of sequences, too."""
            return super().accumulate_gradients(kind[:2], *others)

        def warm_up(self):
            """Compiles both sizes."""
            super().warm_up()
            sequences = self.micro_sequences
            self.micro_sequences = sequences // 2
            super().warm_up()
            self.micro_sequences = sequences

    return Trainer


def install(script) -> None:
    """Changes train_gpt.py's batches, schedule and trainer."""
    script.Batches = halving(script.Batches)
    script.Trainer = taking_halves(script)
