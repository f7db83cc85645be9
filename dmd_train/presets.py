"""The presets of training: every number with where it comes from.

D1 is DMD (arXiv 2311.18828), D2 is DMD2 (arXiv 2405.14867). Both count critic updates as
iterations; steps here are student updates, D2's iterations over its critic updates for one.
"""

from typing import Any, NamedTuple

from .families import FAMILIES


class Choice(NamedTuple):
    """A value, and its source or reason."""

    value: Any
    source: str


class Preset(NamedTuple):
    """Settings of a run, and what it is for. Of which families: `families_of`."""

    about: str
    choices: dict[str, Choice]

    @property
    def settings(self) -> dict[str, Any]:
        return {key: choice.value for key, choice in self.choices.items()}


ONE_GPU = "one consumer GPU"
MEASURED = "measured, docs/findings/what-learns.md"
STEPS_MEASURED = "measured, docs/findings/four-steps.md"
WATCH = "how often one wants to look"

DIGITS_ONE_STEP = {
    "training": Choice("full", "the network is small"),
    "cpu_threads": Choice(1, "these matrices are too small to share"),
    "steps": Choice(1500, "tuned: two minutes on a CPU"),
    "batch_size": Choice(32, "tuned"),
    "learning_rate": Choice(4e-3, "tuned"),
    "warmup_steps": Choice(50, "tuned"),
    "schedule": Choice("cosine", "tuned"),
    "ema_decay": Choice(0.995, "tuned"),
    "critic_updates": Choice(5, "D2 4.2, ImageNet"),
    "regression_weight": Choice(16.0, "tuned"),
    "pairs": Choice(16000, "tuned"),
    "pair_batch_size": Choice(512, "tuned"),
    "pair_sampler": Choice("heun", "D1 B.1"),
    "pair_steps": Choice(18, "D1 B.1"),
    "checkpoint_every": Choice(250, WATCH),
    "sample_every": Choice(250, WATCH),
}

SD_FULL = {
    "training": Choice("full", "D1, D2"),
    "gradient_checkpointing": Choice(True, "D1 B.3; " + ONE_GPU),
    "optimizer": Choice("auto", "8 bits where bitsandbytes is there: " + ONE_GPU),
    "steps": Choice(4000, "D2 B.5: 40,000 iterations, 10 critic updates for one"),
    "batch_size": Choice(8, ONE_GPU + "; D2 has 2048"),
    "micro_batch_size": Choice(1, ONE_GPU),
    "learning_rate": Choice(1e-5, "D2 B.5, SD 1.5"),
    "warmup_steps": Choice(100, "D2's 500, at a tenth of its steps"),
    "ema_decay": Choice(0.0, "D1 and D2 have none; it would be one more copy"),
    "critic_updates": Choice(10, "D2 B.5, SD 1.5"),
    "guidance": Choice(3.0, "D1 3.4, LAION 6.25+; D2's 1.75 is diverse but soft"),
    "regression_weight": Choice(0.0, "D2 4.1: prompts alone"),
    "pairs": Choice(1000, "made only if regression is switched on"),
    "pair_batch_size": Choice(4, ONE_GPU),
    "pair_sampler": Choice("pndm", "D1 B.3"),
    "pair_steps": Choice(50, "D1 B.3"),
    "regression_loss": Choice("pseudo-huber", "in latents: LPIPS needs weights of its own"),
    "adversarial_weight": Choice(1e-3, "D2 B.5, SD 1.5; only with images"),
    "critic_adversarial_weight": Choice(1e-2, "D2 B.5; only with images"),
    "checkpoint_every": Choice(100, WATCH),
    "sample_every": Choice(100, WATCH),
}

STOCK = {
    "timesteps": Choice([499], f"{MEASURED}; at 999 small batches learn little"),
    "input_noise": Choice("sigma", f"{MEASURED}; exact in a stock ComfyUI"),
}

FEW_PAIRS = {
    "beta1": Choice(0.0, MEASURED),
    "regression_weight": Choice(2.0, f"{MEASURED}; to the end, or it is undone"),
    "pairs": Choice(256, f"{MEASURED}; a fortieth of the run's cost"),
}

SD_LORA = (
    SD_FULL
    | STOCK
    | FEW_PAIRS
    | {
        "training": Choice("lora", "one frozen network with two adapters: " + ONE_GPU),
        "steps": Choice(3000, "D2 B.5, LoRA: 16,000 iterations, 5 critic updates for one"),
        "micro_batch_size": Choice(4, ONE_GPU),
        "learning_rate": Choice(5e-5, "D2 B.5, LoRA"),
        "ema_decay": Choice(0.99, "cheap for adapters; steadies small batches"),
        "lora_rank": Choice(64, "D2 B.5"),
        "lora_alpha": Choice(8.0, "D2 B.5"),
    }
)

SDXL = {
    "steps": Choice(5000, "D2 B.5: 25,000 iterations, 5 critic updates for one"),
    "batch_size": Choice(4, ONE_GPU + "; D2 has 128"),
    "micro_batch_size": Choice(1, ONE_GPU),
    "critic_updates": Choice(5, "D2 B.5, SDXL"),
    "guidance": Choice(8.0, "D2 B.5, SDXL"),
    "regression_warmup_steps": Choice(1000, "D2 B.4 has 2,000 on 10,000 pairs: it cures the rest"),
    "pairs": Choice(1000, ONE_GPU + "; D2 has 10,000"),
    "pair_sampler": Choice("euler", "D2 B.4, trailing"),
    "adversarial_weight": Choice(5e-3, "D2 B.5, SDXL; only with images"),
    "pair_batch_size": Choice(4, "D2 B.4, of one GPU"),
}

SDXL_FULL = {
    "learning_rate": Choice(5e-7, "D2 B.5, SDXL"),
    "timesteps": Choice([399], "D2 4.5: 999 gives block noise"),
}

SDXL_RANK = Choice(32, "64 of D2 B.5 does not fit 16 GB twice")

ANY = {
    "timesteps": Choice([999], "all that flow models have"),
    "input_noise": Choice("unit", "as at 999"),
    "micro_batch_size": Choice(1, "other models are mostly larger: " + ONE_GPU),
    "learning_rate": Choice(5e-5, "D2 B.5, LoRA for SDXL; untuned"),
    "critic_updates": Choice(10, "D2 B.5, SD 1.5; untuned, of the two published the safer"),
    "lora_rank": Choice(32, "as for SDXL; untuned"),
    "guidance": Choice(4.5, "SD3.5 large's own; untuned. Models told their guidance (Flux): 1"),
    "pair_sampler": Choice("euler", "all that flow models have here; others have it too"),
    "pair_steps": Choice(28, "SD3 medium's, in SD3.5's reference code"),
}

SEVERAL_STEPS = {
    "sampler": Choice("deterministic", STEPS_MEASURED),
    "input_noise": Choice("sigma", f"{STEPS_MEASURED}; exact in a stock ComfyUI"),
    "regression_weight": Choice(2.0, STEPS_MEASURED),
    "regression_warmup_steps": Choice(0, "a warm-up that ends is undone, docs/findings"),
    "regression_loss": Choice("mse", STEPS_MEASURED),
    "pairs": Choice(256, STEPS_MEASURED),
}
FOUR_STEPS = SEVERAL_STEPS | {"timesteps": Choice([799, 599, 399, 199], STEPS_MEASURED)}
TWO_STEPS = SEVERAL_STEPS | {"timesteps": Choice([499, 249], STEPS_MEASURED)}
FOUR_OF_ANY = {
    "timesteps": Choice([999, 749, 499, 249], "D2 4.4; flow models begin at 999"),
    "input_noise": Choice("unit", "as at 999"),
}
TRAILING = {
    "pair_sampler": Choice("dpmpp-2m", "begins at 999, as the student does"),
    "pair_steps": Choice(25, "measured with 12 on small networks; untuned"),
}

PAPER = SD_FULL | {
    "optimizer": Choice("adamw", "D1"),
    "steps": Choice(20000, "D1 B.3, LAION 6.25+"),
    "batch_size": Choice(2304, "D1 B.3: 72 GPUs of 32"),
    "micro_batch_size": Choice(32, "D1 B.3"),
    "warmup_steps": Choice(500, "D1 B.3"),
    "critic_updates": Choice(1, "D1 algorithm 1"),
    "regression_weight": Choice(0.25, "D1 3.3"),
    "regression_loss": Choice("lpips", "D1 3.3"),
    "pairs": Choice(500000, "D1 B.3"),
    "pair_batch_size": Choice(1152, "D1 B.3"),
}

DMD2 = SD_FULL | {
    "optimizer": Choice("adamw", "D2"),
    "batch_size": Choice(2048, "D2 B.5: 64 GPUs of 32"),
    "micro_batch_size": Choice(32, "D2 B.5"),
    "warmup_steps": Choice(500, "D2 B.5"),
    "guidance": Choice(1.75, "D2 B.5"),
}

PRESETS: dict[str, Preset] = {
    "digits-one-step": Preset("the embedded digits, minutes", DIGITS_ONE_STEP),
    "sd15-one-step-lora": Preset("SD 1.x on one GPU, gives a LoRA", SD_LORA),
    "sd15-four-step-lora": Preset(
        "SD 1.x in four steps, gives a LoRA", SD_LORA | FOUR_STEPS | TRAILING
    ),
    "sd15-two-step-lora": Preset(
        "SD 1.x in two steps, gives a LoRA", SD_LORA | TWO_STEPS | TRAILING
    ),
    "sd15-one-step-full": Preset("SD 1.x, three networks, gives a UNet", SD_FULL | STOCK),
    "sd2-one-step-lora": Preset("SD 2.x on one GPU, gives a LoRA", SD_LORA),
    "sd2-one-step-full": Preset("SD 2.x, three networks, gives a UNet", SD_FULL | STOCK),
    "sdxl-one-step-lora": Preset(
        "SDXL on one GPU, gives a LoRA; warms up on pairs, and keeps them",
        SD_LORA | SDXL | {"lora_rank": SDXL_RANK},
    ),
    "sdxl-four-step-lora": Preset(
        "SDXL in four steps, gives a LoRA",
        SD_LORA | SDXL | FOUR_STEPS | TRAILING | {"lora_rank": SDXL_RANK},
    ),
    "sdxl-one-step-full": Preset(
        "SDXL, three networks, several GPUs; warms up on pairs",
        SD_FULL | SDXL | SDXL_FULL,
    ),
    "any-one-step-lora": Preset(
        "any other model, in ComfyUI; gives a LoRA; untuned", SD_LORA | ANY
    ),
    "any-four-step-lora": Preset(
        "any other model in four steps, in ComfyUI; gives a LoRA; untuned",
        SD_LORA | ANY | SEVERAL_STEPS | FOUR_OF_ANY,
    ),
    "sd15-paper": Preset("DMD as published: pairs and LPIPS, a cluster", PAPER),
    "sd15-dmd2": Preset("DMD2's first stage as published, a cluster", DMD2),
}


def families_of(preset: str) -> list[str]:
    """Names of the families whose teachers it is for; none: it is for any other."""
    return [family.name for family in FAMILIES.values() if preset in family.presets]


def presets_for(family: str) -> list[str]:
    """Names of those for a family, the one for one consumer GPU first; else of those for any."""
    if family in FAMILIES:
        return list(FAMILIES[family].presets)
    return [name for name in PRESETS if not families_of(name)]
