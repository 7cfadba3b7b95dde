"""The code and the commands of a model card: only what works for its model."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedConfig

from dsvae.config import DataConfig

LOAD = """from dsvae import T5VAE
from transformers import AutoTokenizer

model, tokenizer = T5VAE.from_pretrained(DIR), AutoTokenizer.from_pretrained(DIR)
"""

ENCODE = """batch = tokenizer(["a sentence to encode"], return_tensors="pt", padding=True)
z = model.encode(batch.input_ids, batch.attention_mask).point
print(tokenizer.batch_decode(model.generate(latent=z, max_new_tokens=40), skip_special_tokens=True))
"""

PAIR = """condition = tokenizer(["a condition"], return_tensors="pt").input_ids
sentence = tokenizer(["a sentence to encode"], return_tensors="pt").input_ids
"""

ENCODE_PAIR = """z = model.encode(torch.cat([condition, sentence], dim=1)).point
other = model.prior(condition).sample(torch.randn(1, model.family.noise_width))
for latent in (z, other):
    ids = model.generate(latent=latent, condition_ids=condition, max_new_tokens=40)
    print(tokenizer.batch_decode(ids, skip_special_tokens=True))
"""

SCORE = """ids = tokenizer("a sentence to score", return_tensors="pt").input_ids
logits = model(labels=ids, latent=torch.zeros(1, 0)).logits
log_p = logits.log_softmax(-1).gather(-1, ids[..., None]).sum()
sampled = model.generate(latent=torch.zeros(4, 0), do_sample=True, max_new_tokens=40)
print(log_p.item(), tokenizer.batch_decode(sampled, skip_special_tokens=True))
"""

SCORE_PAIR = """latent = torch.zeros(1, 0)
logits = model(labels=sentence, latent=latent, condition_ids=condition).logits
log_p = logits.log_softmax(-1).gather(-1, sentence[..., None]).sum()
ids = model.generate(latent=latent, condition_ids=condition, max_new_tokens=40)
print(log_p.item(), tokenizer.batch_decode(ids, skip_special_tokens=True))
"""


def use(config: PreTrainedConfig, data: DataConfig) -> str:
    """The section on use.

    Args:
        config: of the model.
        data: names the columns of the training, which the commands repeat.
    """
    commands = list(_commands(config, data))
    commands[0] += "    # metrics with standard errors; report.html"
    lines = "\n".join(commands)
    return f"## Use\n\n```python\n{_code(config)}```\n\n```bash\n{lines}\n```\n"


def _code(config: PreTrainedConfig) -> str:
    if config.conditional:
        return f"import torch\n{LOAD}{PAIR}{ENCODE_PAIR if config.latent_dim else SCORE_PAIR}"
    return f"{LOAD}{ENCODE}" if config.latent_dim else f"import torch\n{LOAD}{SCORE}"


def _commands(config: PreTrainedConfig, data: DataConfig) -> Iterator[str]:
    condition, label, tags = data.condition_column, data.label_column, data.tags_column
    named = {"condition": condition, "label": label, "tags": tags if config.tags else None}
    columns = "".join(f" --{kind}_column {name}" for kind, name in named.items() if name)
    text = "" if data.text_column == "text" else f" --text_column {data.text_column}"
    test = f"test.jsonl{text}{columns}" if columns else "test.txt"
    yield f"dsvae evaluate DIR --test_file {test}"
    if not config.latent_dim:
        return
    file, own = "sentences.txt", ""
    if config.conditional:
        file, own = f"test.jsonl{text} --condition_column {condition}", ' --condition "a condition"'
    elif config.posterior_reads == "condition":  # what the encoder reads is called its text
        file = f"test.jsonl --text_column {condition}"
    yield f"dsvae sample DIR -n 20{own}"
    yield f"dsvae reconstruct DIR {file}"
    if config.family != "categorical":
        yield f'dsvae interpolate DIR "one sentence" "another" --steps 8{own}'
    for command, head in (
        ("cluster", config.clusters),
        ("classify", config.classes),
        ("tag", config.tags),
    ):
        if head:
            yield f"dsvae {command} DIR {file}"
