"""What `dsvae fit_prior` does: a density fitted to draws of q(z), kept beside the
model.

The aggregate posterior q(z) = E_x q(z|x) is where the decoder was trained. It differs from
the prior p(z) by the marginal KL, KL(q(z) || p(z)) = E_q log q(z) - E_q log p(z). With a
density in place of p(z), this falls by the difference of their mean log-densities over
draws of q(z).
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsvae import pretrained
from dsvae.config import convert
from dsvae.data.noise import LATENT
from dsvae.data.records import Record
from dsvae.data.tokenization import hash_of
from dsvae.errors import UserError, first_line
from dsvae.generation.latents_file import write_tensors
from dsvae.generation.options import PriorKind
from dsvae.modeling.densities import Density, Flow, GaussianMixture, flow_of

if TYPE_CHECKING:
    from dsvae.generation.sentence_vae import SentenceVAE

NAME = "fitted_prior.safetensors"
"""The file in the model's directory."""

COMPONENTS = (1, 2, 5, 10, 20, 50)
"""The numbers of Gaussians that a gmm is tried with, until one is worse than the
last."""

STEPS, BATCH, RATE, CHECK_EVERY = 2000, 512, 1e-3, 100
"""Of the training of a flow: steps, draws per step, the first learning rate of Adam,
which falls to 0, and the steps between two looks at the validation draws."""


class Draws(NamedTuple):
    """One draw of q(z|x) for each of N sentences, in an order that is not that of the
    file, in three parts. Equal sentences are in one part."""

    train: Tensor
    """(N1, Z), about 80%."""
    valid: Tensor
    """(N2, Z), 10%: they choose the components of a gmm and the step of a flow."""
    held_out: Tensor
    """(N3, Z), 10%, which no choice depends on."""


def check(vae: SentenceVAE) -> None:
    """Raises UserError for a model whose prior cannot be replaced by one density."""
    config = vae.model.config
    if not config.has_latent:
        raise UserError("the model has no latent (injection none): there is no prior to fit")
    if config.prior == "learned":
        raise UserError(
            "the model's prior p(z|c) is learned, another one for each condition: one density of "
            "z would lose the condition; sample with --condition"
        )
    if config.latent_vectors > 1 and config.pooling == "chunks":
        raise UserError(
            "the texts of this model have different numbers of vectors, and one density is of one "
            "number: train a prior by flow matching instead (dsvae/train.py --phase prior --model "
            "DIR); fit_prior needs one vector per text, or pooling queries"
        )
    if not vae.model.family.continuous:
        raise UserError(
            f"the model's latent is {config.family}, and the densities are those of continuous z: "
            f"give a model with a continuous latent"
        )


def draw(vae: SentenceVAE, records: Iterable[str | Record], seed: int = 0) -> Draws:
    """Draws from the posteriors of a stream of sentences.

    The noise of a sentence is keyed by its content and the number of equal ones before
    it, so nothing depends on the order of the file.

    Raises:
        UserError: a model without such draws (`check`), or too few sentences.
    """
    check(vae)
    family, seen = vae.model.family, Counter[int]()
    keys: list[tuple[int, int]] = []
    parts = []
    for _, inputs in vae.inputs.stream(records, vae.batch_size):
        first = len(keys)
        conditions = inputs.condition_ids or [[]] * len(inputs)
        for condition, ids in zip(conditions, inputs.ids, strict=True):
            key = hash_of(condition + ids)
            keys.append((key, seen[key]))
            seen[key] += 1
        pairs = ((repetition, key) for key, repetition in keys[first:])
        noise = vae.passes.noise(seed, LATENT, pairs)
        parts.append(vae.encode_inputs(inputs).posterior.sample(noise))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    latent = torch.cat(parts)[order] if parts else torch.empty(0, family.latent_width)
    tenth = torch.tensor([keys[i][0] % 10 for i in order])
    draws = Draws(latent[tenth > 1], latent[tenth == 1], latent[tenth == 0])
    if len(draws.train) <= family.latent_width or not (len(draws.valid) and len(draws.held_out)):
        raise UserError(
            f"{len(latent)} sentences are too few to fit a density of {family.latent_width} "
            f"dimensions and to check it: give more"
        )
    return draws


def fit(draws: Draws, kind: PriorKind, components: int | None = None, seed: int = 0) -> Density:
    """Fits a density to the draws.

    Args:
        kind: gaussian: mean and full covariance. gmm: a mixture of Gaussians with full
            covariances, by expectation maximization. flow: a real NVP, begun as the
            gaussian, as of the training step with the best validation draws.
        components: Gaussians of a gmm. None: as the validation draws choose.
        seed: of the start of a gmm and of the training of a flow.

    Raises:
        UserError: another kind, a flow of one dimension, or not enough draws for so many
            components.
    """
    convert(kind, PriorKind, "kind")
    gaussian = _mixture(draws.train, 1, seed)
    if kind == "flow":
        return _flow(draws, gaussian, seed)
    if kind == "gmm" and components is not None:
        return _mixture(draws.train, components, seed)
    if kind == "gmm":
        return _best_mixture(draws, gaussian, seed)
    return gaussian


def compare(vae: SentenceVAE, density: Density, held_out: Tensor) -> dict[str, float]:
    """Measures how well a density fits draws (N, Z), beside the model's own prior.

    Returns: in nats per sentence `log_p_prior` and `log_p_fitted`, the mean
        log-densities; `gain`, their difference, by which the marginal KL falls, and
        `gain_se`, its standard error.
    """
    own = vae.model.family.prior().log_prob(held_out).double()
    fitted = density.log_prob(held_out).double()
    gain = fitted - own
    return {
        "log_p_prior": float(own.mean()),
        "log_p_fitted": float(fitted.mean()),
        "gain": float(gain.mean()),
        "gain_se": float(gain.std()) / len(gain) ** 0.5,
    }


def place(model_dir: str) -> Path:
    """Finds where the prior of a model is written. Raises UserError for a model that is
    not in a directory of its own."""
    directory = Path(model_dir).expanduser()
    if not directory.is_dir():
        raise UserError(
            f"{model_dir}: no such directory; the prior is written into that of the model: "
            f"download a hub model first"
        )
    return directory / NAME


def load_prior(model_dir: str) -> Density:
    """Loads the prior that was fitted to a model, from its directory or hub id.

    Raises:
        UserError: there is none, or the file is damaged.
    """
    path = pretrained.find_directory(model_dir) / NAME
    if not path.is_file():
        raise UserError(
            f"{model_dir} has no fitted prior: make one with dsvae fit_prior {model_dir} "
            f"--train_file FILE"
        )
    try:
        with safe_open(path, "pt") as file:
            kind = (file.metadata() or {}).get("kind")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return flow_of(tensors) if kind == "flow" else GaussianMixture(**tensors)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{path} cannot be read ({first_line(error)}): repeat dsvae fit_prior"
        ) from error


def fit_and_save(
    vae: SentenceVAE,
    records: Iterable[str | Record],
    path: Path,
    kind: PriorKind,
    components: int | None,
    seed: int,
) -> dict[str, Any]:
    """Fits a prior to the sentences of a stream and writes it.

    Args:
        seed: of the draws and of `fit`.

    Returns: what `dsvae fit_prior --json` prints.
    """
    draws = draw(vae, records, seed)
    density = fit(draws, kind, components, seed)
    # whole or not at all
    write_tensors(path, density.tensors(), {"kind": kind})
    row: dict[str, Any] = {"kind": kind}
    if isinstance(density, GaussianMixture):
        row["components"] = len(density.weights)
    row |= {"sentences": sum(map(len, draws)), "held_out": len(draws.held_out)}
    return {**row, **compare(vae, density, draws.held_out), "file": str(path)}


def _mixture(draws: Tensor, components: int, seed: int) -> GaussianMixture:
    from sklearn import mixture
    from sklearn.exceptions import ConvergenceWarning

    if not 1 <= components <= len(draws):
        raise UserError(f"{components} components for {len(draws)} sentences: give 1 to as many")
    model = mixture.GaussianMixture(components, random_state=seed)
    with warnings.catch_warnings():  # the held-out draws say how good it is
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(draws.double().numpy())
    covariances = torch.from_numpy(model.covariances_)
    return GaussianMixture(
        torch.from_numpy(model.weights_),
        torch.from_numpy(model.means_),
        torch.linalg.cholesky(covariances),
    )


def _best_mixture(draws: Draws, gaussian: GaussianMixture, seed: int) -> GaussianMixture:
    best, score = gaussian, float(gaussian.log_prob(draws.valid).mean())
    for components in COMPONENTS[1:]:
        if components > len(draws.train):
            break
        other = _mixture(draws.train, components, seed)
        if (found := float(other.log_prob(draws.valid).mean())) <= score:
            break
        best, score = other, found
    return best


def _flow(draws: Draws, gaussian: GaussianMixture, seed: int) -> Flow:
    if gaussian.latent_width < 2:
        raise UserError("a flow needs at least 2 dimensions, and z has 1: fit a gmm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = Flow(gaussian.means[0], gaussian.factors[0])
        optimizer = torch.optim.Adam(flow.parameters(), RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        best, kept = -float("inf"), {}
        for step in range(STEPS + 1):
            if step % CHECK_EVERY == 0:
                with torch.no_grad():
                    found = float(flow.log_prob(draws.valid).double().mean())
                if found > best:
                    best, kept = found, {n: t.clone() for n, t in flow.state_dict().items()}
            batch = draws.train[torch.randint(len(draws.train), (BATCH,))]
            optimizer.zero_grad()
            (-flow.log_prob(batch).mean()).backward()
            torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return flow_of(kept)
