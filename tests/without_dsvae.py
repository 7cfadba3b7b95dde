"""What a model gives; as a script, what packaged models give where dsvae cannot be
imported: `without_dsvae.py OUTPUT NAME_OR_PATH...` writes it to OUTPUT."""

import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

TEXTS = ["the red cat sees a dog", "a dog runs"]


def outputs(model, tokenizer):
    """Posterior, logits and generated tokens, with prior and tags where they are."""
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    ids, mask = batch.input_ids, batch.attention_mask
    condition = {}
    if model.config.conditional:
        condition = {"condition_ids": ids[:, :3], "condition_mask": mask[:, :3]}
    latent = model.encode(ids, mask).point
    given = {"labels": ids.masked_fill(mask == 0, -100)}
    if model.config.tags:
        given["tag_labels"] = (ids % len(model.config.tags)).masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(ids, mask, **given, **condition)
        found = {
            "ids": ids,
            "logits": out.logits,
            "posterior": out.posterior.parameters,
            "prior": model.prior(*condition.values()).parameters.clone(),
        }
    if model.config.tags:
        found |= {"tag_nats": out.tag_nats, "tags": out.tags}
    for name, options in {
        "greedy": {},
        "no cache": {"use_cache": False},
        "beams": {"num_beams": 3},
    }.items():
        found[name] = model.generate(latent=latent, max_new_tokens=8, **condition, **options)
    return {name: value.contiguous() for name, value in found.items()}


class Refuse:
    """Refuses to import dsvae."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "dsvae":
            raise ImportError("dsvae is refused")


def main(output, names):
    sys.meta_path.insert(0, Refuse())
    with pytest.raises(ImportError, match="dsvae is refused"):
        import dsvae  # noqa: F401
    found = {}
    for name in names:
        model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
        found |= {f"{name} {key}": value for key, value in outputs(model, tokenizer).items()}
    # what transformers saves has the code, too
    model.save_pretrained(f"{output}.saved")
    model = AutoModel.from_pretrained(f"{output}.saved", trust_remote_code=True).eval()
    found |= {f"saved {key}": value for key, value in outputs(model, tokenizer).items()}
    assert not any(name.partition(".")[0] == "dsvae" for name in sys.modules)
    save_file(found, output)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
