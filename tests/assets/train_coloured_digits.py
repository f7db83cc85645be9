"""A latent text-to-image teacher small enough for a test: coloured digits and shapes, 32x32.

Draws its own data, trains a VAE, then a UNet and its text encoder together, and writes the
Stable Diffusion folder coloured-digits/ and the contact sheet coloured-digits.png beside itself:

    python tests/assets/train_coloured_digits.py

The weights are a function of SEED, up to the arithmetic of the machine. One CPU thread, about
20 minutes. The digits are scikit-learn's (UCI optical digits, CC BY 4.0).
"""

import functools
import math
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

FOLDER = Path(__file__).with_name("coloured-digits")
SEED = 0
SIZE = 32
IMAGES_PER_PROMPT = 64
VAE_STEPS = 900
TEACHER_STEPS = 2700
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.9, 0.8, 0.15),
    "white": (0.9, 0.9, 0.9),
    "black": (0.1, 0.1, 0.1),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SHAPES = ("circle", "square", "triangle", "cross")


class Prompt(NamedTuple):
    """What a picture shows; str() is what the text encoder reads."""

    colour: str
    thing: str
    background: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.thing} on {self.background}"


SHEET = (
    Prompt("red", "seven", "blue"),
    Prompt("green", "circle", "black"),
    Prompt("white", "three", "red"),
    Prompt("yellow", "triangle", "blue"),
    Prompt("black", "five", "yellow"),
    Prompt("blue", "cross", "white"),
    Prompt("yellow", "zero", "green"),
    Prompt("black", "square", "green"),
)


def prompts() -> list[Prompt]:
    """Every thing in every pair of different colours: 420."""
    return [
        Prompt(colour, thing, background)
        for thing in (*DIGITS, *SHAPES)
        for colour in COLOURS
        for background in COLOURS
        if colour != background
    ]


@functools.cache
def handwriting(digit: int) -> Tensor:
    """scikit-learn's: (N, 8, 8) in [0, 1]."""
    data = load_digits()
    return torch.tensor(data.images[data.target == digit]).float() / 16


def coverage(thing: str, u: Tensor, v: Tensor, gen: torch.Generator) -> Tensor:
    """How much of each pixel `thing` covers; it spans [-1, 1] in u (right) and v (down)."""
    if thing in DIGITS:
        written = handwriting(DIGITS.index(thing))
        digit = written[torch.randint(len(written), (), generator=gen)]
        grid = torch.stack([u, v], dim=-1)[None]
        ink = functional.grid_sample(digit[None, None], grid, align_corners=False)[0, 0]
        return (2 * ink - 0.4).clamp(0, 1)
    outside = {
        "circle": torch.hypot(u, v) - 0.9,
        "square": torch.maximum(u.abs(), v.abs()) - 0.75,
        "triangle": torch.maximum(v - 0.75, (2 * u.abs() - v - 0.9) / math.sqrt(5)),
        "cross": torch.maximum(
            torch.minimum(u.abs(), v.abs()) - 0.25, torch.maximum(u.abs(), v.abs()) - 0.9
        ),
    }[thing]
    return (0.5 - outside * SIZE / 3).clamp(0, 1)


def draw(prompt: Prompt, gen: torch.Generator) -> Tensor:
    """(3, 32, 32) in [-1, 1]; place, size, slant, shades and handwriting differ every time."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=gen))

    def shade(colour: str) -> Tensor:
        jitter = uniform(-0.1, 0.1) + 0.05 * torch.randn(3, generator=gen)
        return (torch.tensor(COLOURS[colour]) + jitter).clamp(0, 1)[:, None, None]

    radius, angle = uniform(11, 14), uniform(-0.2, 0.2)
    margin = SIZE / 2 - radius
    centre_x, centre_y = (SIZE / 2 + uniform(-margin, margin) for _ in range(2))
    pixel = torch.arange(SIZE) + 0.5
    y, x = torch.meshgrid((pixel - centre_y) / radius, (pixel - centre_x) / radius, indexing="ij")
    u = math.cos(angle) * x + math.sin(angle) * y
    v = math.cos(angle) * y - math.sin(angle) * x
    ground, ink = shade(prompt.background), shade(prompt.colour)
    return 2 * torch.lerp(ground, ink, coverage(prompt.thing, u, v, gen)) - 1


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        norm_num_groups=8,
        sample_size=SIZE,
    )


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's, with every word of the prompts as a token, spelt from its end, and every letter."""
    characters = [*string.ascii_lowercase, *string.digits]
    words = sorted({word for prompt in prompts() for word in str(prompt).split()})
    suffixes = {word[i:]: word[i] for word in words for i in reversed(range(len(word) - 1))}
    merges = [(first, f"{suffix[1:]}</w>") for suffix, first in suffixes.items()]
    tokens = ["<|startoftext|>", "<|endoftext|>", *characters]
    tokens += [f"{text}</w>" for text in (*characters, *suffixes)]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def optimise(
    modules: list[nn.Module],
    loss: Callable[[], Tensor],
    learning_rate: float,
    steps: int,
    name: str,
) -> None:
    """Adam with warm-up and cosine; the weights end as their moving average."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, fused=True)
    running = torch.zeros(())
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for step in bar:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / 100) * cosine
        optimizer.step()
        decay = min(0.998, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(average, parameters, torch.tensor(step))
        running = torch.lerp(running, value.detach(), 0.02) if step else value.detach()
        bar.set_postfix(loss=f"{running:.4f}", refresh=False)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)


def draw_data() -> Tensor:
    """(prompts, IMAGES_PER_PROMPT, 3, 32, 32)."""
    gen = torch.Generator().manual_seed(SEED)
    rows = tqdm(prompts(), desc="data")
    return torch.stack(
        [torch.stack([draw(prompt, gen) for _ in range(IMAGES_PER_PROMPT)]) for prompt in rows]
    )


def train_vae(data: Tensor) -> AutoencoderKL:
    """Squared error and a little KL; scaling_factor makes the data's latents of unit variance."""
    torch.manual_seed(SEED)
    images = data.flatten(0, 1)
    vae = make_vae()

    def loss() -> Tensor:
        batch = images[torch.randint(len(images), (32,))]
        posterior = vae.encode(batch).latent_dist
        error = functional.mse_loss(vae.decode(posterior.sample()).sample, batch)
        return error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()

    optimise([vae], loss, learning_rate=2e-3, steps=VAE_STEPS, name="vae")
    unit = vae.config.scaling_factor / float(encode(vae, images[::16]).std())
    vae.register_to_config(scaling_factor=unit)
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """(N, 3, 32, 32) -> (N, 4, 8, 8), scaled."""
    means = [vae.encode(chunk).latent_dist.mean for chunk in images.split(256)]
    return vae.config.scaling_factor * torch.cat(means)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    return tokenizer(texts, padding="max_length", return_tensors="pt").input_ids


def train_teacher(
    latents: Tensor, tokenizer: CLIPTokenizer
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Noise prediction with one prompt in ten left out; latents: (prompts, images, 4, 8, 8).

    A batch is 4 images of each of 16 prompts, for then the text encoder reads only 16 texts. The
    error is weighted by 1 / alpha^2, up to 30, since the colours are decided at high noise.
    """
    torch.manual_seed(SEED)
    text_encoder, unet, scheduler = make_text_encoder(tokenizer), make_unet(), make_scheduler()
    ids = token_ids(tokenizer, [str(prompt) for prompt in prompts()])
    empty = token_ids(tokenizer, [""])
    texts, copies = 16, 4
    batch = texts * copies

    def loss() -> Tensor:
        chosen = torch.randint(len(ids), (texts,))
        embeddings = text_encoder(torch.cat([ids[chosen], empty])).last_hidden_state
        row = torch.arange(texts).repeat_interleave(copies)
        x0 = latents[chosen[row], torch.randint(latents.shape[1], (batch,))]
        row[torch.rand(batch) < 0.1] = texts
        uniform = (torch.randperm(batch) + torch.rand(batch)) / batch
        t = (uniform * len(scheduler.alphas_cumprod)).long()
        noise = torch.randn_like(x0)
        prediction = unet(scheduler.add_noise(x0, noise, t), t, embeddings[row]).sample
        weight = (1 / scheduler.alphas_cumprod[t]).clamp(max=30)
        return (weight * (prediction - noise).square().mean(dim=(1, 2, 3))).mean()

    optimise([unet, text_encoder], loss, learning_rate=1e-3, steps=TEACHER_STEPS, name="teacher")
    return unet, text_encoder


def save(pipeline: StableDiffusionPipeline) -> None:
    """In float16; the tokenizer also as the vocab.json and merges.txt of older readers."""
    pipeline.to(dtype=torch.float16).save_pretrained(FOLDER)
    pipeline.tokenizer.backend_tokenizer.model.save(str(FOLDER / "tokenizer"))


def contact_sheet() -> Image.Image:
    """What the saved folder draws: a row of 8 samples for each of SHEET, guidance 3, 50 steps."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        FOLDER, dtype=torch.float32, safety_checker=None, local_files_only=True
    )
    sheet = Image.new("RGB", (8 * SIZE, len(SHEET) * SIZE))
    texts = [str(prompt) for prompt in SHEET for _ in range(8)]
    gen = torch.Generator().manual_seed(SEED)
    images = pipeline(texts, guidance_scale=3.0, num_inference_steps=50, generator=gen).images
    for number, image in enumerate(images):
        sheet.paste(image, (number % 8 * SIZE, number // 8 * SIZE))
    sheet = sheet.quantize(128, dither=Image.Dither.NONE)
    return sheet.resize((3 * sheet.width, 3 * sheet.height), Image.Resampling.NEAREST)


def main() -> None:
    torch.set_num_threads(1)
    data = draw_data()
    vae = train_vae(data)
    tokenizer = make_tokenizer()
    latents = encode(vae, data.flatten(0, 1)).unflatten(0, data.shape[:2])
    unet, text_encoder = train_teacher(latents, tokenizer)
    save(
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=make_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
    contact_sheet().save(FOLDER.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
