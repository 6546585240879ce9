"""Idea: half the batch while rates are high. An --idea of `python -m tools.explore`.

A step of few tokens is noisier, which costs little while the model is far from where it goes, and
twice as many of them fit into the same tokens. Until SMALL of the run is over a step has
half of TRAIN_BATCH_TOKENS, so that this part of the run makes twice the steps.
"""

SMALL = 0.4  # of the run


def install(script) -> None:
    """Changes train_gpt.py's batches, schedule and trainer."""

    class Batches(script.Batches):
        """Batches of which the first come in two halves."""

        halves = ()

        def next(self):
            """The next batch, or half of one while the trainer wants small ones."""
            if not self.small:
                self.halves = ()
                return super().next()
            if not self.halves:
                tokens, targets = super().next()
                half = len(tokens) // 2
                first, second = (tokens[:half], targets[:half]), (tokens[half:], targets[half:])
                self.halves = [second, first]
            return self.halves.pop()

        small = True

    class Trainer(script.Trainer):
        """Counts a small step as half of one, where ITERATIONS ends the run."""

        def run(self, batches, validate):
            """As the script's; tells batches which part of the run it is."""
            inner, graphed = script.schedule_at, self.graphed_steps
            whole = self.settings.iterations

            def schedule_at(settings, step, seconds):
                # A run by steps: the first 2 SMALL whole steps are half ones.
                first = 2 * SMALL * whole
                done = step / 2 if step < first else step - first / 2
                now = inner(settings, done, seconds)
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

        def step(self, kind, tokens, targets, lr_factor, momentum):
            """A step whose kind may name its number of sequences."""
            return super().step(kind[:2], tokens, targets, lr_factor, momentum)

        def warm_up(self):
            """Compiles both sizes."""
            super().warm_up()
            sequences = self.micro_sequences
            self.micro_sequences = sequences // 2
            super().warm_up()
            self.micro_sequences = sequences

    script.Batches = Batches
    script.Trainer = Trainer
