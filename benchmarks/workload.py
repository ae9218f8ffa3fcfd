"""What both sides are asked to do: sizes of the networks and of the data. Nothing here imports either library."""

import dataclasses
import json

PARTS = {"forward": "forward", "train": "forward + backward + AdamW", "sample": "DDIM"}
"""What is run, and how the table calls it."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A class-conditional network on latents `[batch, size, size, channels]`, and what is run.

    model: `dit` (patch 2) or `unet`. part: a key of `PARTS`. steps: of a DDIM run; one network evaluation each.
    DiT: width, depth, heads. U-Net: width of the first level, multipliers, attention per level, depth the number of
    residual blocks per level, head_dim.
    settings: a key of `ours.TRAINED`, which decides how a DiT is trained; what is fastest if empty.
    """

    model: str = "dit"
    part: str = "forward"
    batch: int = 8
    size: int = 32
    channels: int = 4
    classes: int = 1000
    steps: int = 50
    width: int = 384
    depth: int = 12
    heads: int = 6
    multipliers: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    head_dim: int = 64
    settings: str = ""

    @property
    def title(self) -> str:
        name = (
            f"DiT {self.depth}×{self.width}, patch 2"
            if self.model == "dit"
            else f"U-Net {self.width}×{self.multipliers}"
        )
        what = f"{self.steps} DDIM steps" if self.part == "sample" else PARTS[self.part]
        return f"{name}, batch {self.batch} of {self.size}×{self.size}×{self.channels}: {what}"

    @classmethod
    def read(cls, text: str) -> "Workload":
        """A workload from the JSON of its fields: how one process tells it to another."""
        fields = json.loads(text)
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})

    def written(self) -> str:
        """What `read` reads."""
        return json.dumps(dataclasses.asdict(self))

    def small(self) -> "Workload":
        """The same with a tiny network, to see that everything runs."""
        sizes = {"batch": 2, "size": 8, "steps": 3, "classes": 10, "head_dim": 32, "width": 64, "heads": 2}
        return dataclasses.replace(self, **sizes, depth=2 if self.model == "dit" else 1)


DIT = Workload()
"""DiT-S/2 of Peebles & Xie 2023."""

UNET = Workload("unet", width=128, depth=2, multipliers=(1, 2, 2), attention=(0, 1, 1))
"""A U-Net of about as many parameters."""
