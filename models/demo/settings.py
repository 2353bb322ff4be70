"""How long the demo trains, and how large its models are, for each data set."""

from dataclasses import dataclass

WIDTHS = tuple(eighths / 8 for eighths in range(1, 9))


@dataclass(frozen=True)
class Settings:
    """How long and how large, for one data set."""

    batch_size: int
    classifier_epochs: int
    vae_epochs: int
    hidden: tuple[int, int] = (64, 64)
    num_latents: int = 16
    # Mean-field posteriors of whole nets underfit at weight one: on the digits' validation part the NLL at full width
    # was .90 at weight 1, .25 at .2 and .15 at .05.
    kl_weight: float = 0.05
    num_samples: int = 50
    num_draws: int = 200
    num_rows: int = 100

    def quick(self) -> "Settings":
        """The same with next to no training."""
        return Settings(self.batch_size, 1, 1, num_samples=3, num_draws=10, num_rows=12)


SETTINGS = {
    "digits": Settings(batch_size=128, classifier_epochs=150, vae_epochs=400),
    "fashion-mnist": Settings(batch_size=256, classifier_epochs=8, vae_epochs=12),
}
