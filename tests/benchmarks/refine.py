"""How much of rec + kl is inference: the posterior of each sentence is refined by hand.

    python tests/benchmarks/refine.py MODEL... --test_file FILE [--sentences 200] [--steps 400]
        [--draws 8] [--scored 100] [--output FILE]

The encoder gives a Gaussian with a diagonal covariance for each sentence. Here the mean and
the covariance are trained for each sentence alone, by Adam on rec + kl with the decoder as it
is (Cremer et al. 2018, "Inference Suboptimality in Variational Autoencoders"): first with a
diagonal covariance and then with a full one. What the first gains is the amortization gap. All
three posteriors are scored with the same number of fresh draws. MODEL has a Gaussian latent and
no conditions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import command

from dsvae.generation.sentence_vae import SentenceVAE
from dsvae.metrics.likelihood import effective_sample_size, elbo, importance_weighted_bound
from dsvae.modeling.t5_vae import T5VAEOutput
from dsvae.reports.table import markdown

POSTERIORS = ("encoder", "refined, diagonal", "refined, full")


class Refined:
    """A Gaussian N(mean, L L^T) for each of N sentences.

    Args:
        mean, scale: (N, Z), of the diagonal Gaussian that it starts as.
        full: L is a lower triangle, and not diagonal.
    """

    def __init__(self, mean: Tensor, scale: Tensor, full: bool) -> None:
        self.mean = mean.clone().requires_grad_()
        self.log_scale = scale.log().requires_grad_()
        self.below = torch.zeros(*scale.shape, scale.shape[1]).requires_grad_(full)

    def distribution(self) -> torch.distributions.MultivariateNormal:
        triangle = self.below.tril(-1) + torch.diag_embed(self.log_scale.exp())
        return torch.distributions.MultivariateNormal(
            self.mean, scale_tril=triangle, validate_args=False
        )

    def kl(self) -> Tensor:
        """(N,), nats, from N(0, I)."""
        squares = self.below.tril(-1).square().sum((1, 2)) + (2 * self.log_scale).exp().sum(1)
        rest = self.mean.square().sum(1) - self.mean.shape[1] - 2 * self.log_scale.sum(1)
        return (squares + rest) / 2


def decode(vae: SentenceVAE, latent: Tensor, labels: Tensor) -> T5VAEOutput:
    """`nats` has rec of each sentence, (N,), and `weighted_nats`, which has a
    gradient, their sum."""
    weights = torch.ones(len(labels))
    return vae.model(labels=labels, latent=latent, sentence_weights=weights)


def refine(vae: SentenceVAE, labels: Tensor, start: Refined, steps: int, draws: int) -> None:
    """Trains a posterior in place; the learning rate falls to 0."""
    trained = [p for p in (start.mean, start.log_scale, start.below) if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        latent = start.distribution().rsample((draws,)).flatten(0, 1)
        rec = decode(vae, latent, labels.repeat(draws, 1)).weighted_nats / draws
        optimizer.zero_grad()
        (rec + start.kl().sum()).backward()
        optimizer.step()
        scheduler.step()


@torch.no_grad()
def score(vae: SentenceVAE, labels: Tensor, posterior: Refined, draws: int) -> dict[str, float]:
    """Means over the sentences, nats."""
    q, prior = posterior.distribution(), torch.distributions.Normal(0.0, 1.0)
    rec, weights = [], []
    for _ in range(draws):
        latent = q.sample()
        rec.append(decode(vae, latent, labels).nats)
        weights.append(prior.log_prob(latent).sum(1) - q.log_prob(latent) - rec[-1])
    log_weights, log_px_z = torch.stack(weights), -torch.stack(rec)  # (K, N)
    kl = posterior.kl()
    return {
        "rec": float(-log_px_z.mean()),
        "kl": float(kl.mean()),
        "rec + kl": float(-elbo(log_px_z, kl).mean()),
        "nll_iw": float(-importance_weighted_bound(log_weights).mean()),
        "ess": float(effective_sample_size(log_weights).mean()),
    }


def measure(args: argparse.Namespace) -> command.Results:
    lines = Path(args.test_file).read_text(encoding="utf-8").splitlines()
    texts = [line for line in lines if line.strip()][: args.sentences]
    found = {}
    for path in args.model:
        torch.manual_seed(0)
        vae = SentenceVAE.from_pretrained(path)
        vae.model.eval().requires_grad_(False)
        tokens = vae.tokenizer(texts, return_tensors="pt", padding=True)
        labels = tokens.input_ids.masked_fill(tokens.attention_mask == 0, -100)
        given = vae.encode(texts)
        mean, scale = given.mean, (given.logvar / 2).exp()
        rows = {}
        for name in POSTERIORS:
            posterior = Refined(mean, scale, full=name.endswith("full"))
            if name != POSTERIORS[0]:
                refine(vae, labels, posterior, args.steps, args.draws)
                mean, scale = posterior.mean.detach(), posterior.log_scale.detach().exp()
            rows[name] = score(vae, labels, posterior, args.scored)
            print(path, name, rows[name], file=sys.stderr, flush=True)
        found[path] = rows
    return found


def report(results: command.Results) -> str:
    columns: dict[str, list[str]] = {"model": [], "posterior": []}
    for path, rows in results.items():
        for name, values in rows.items():
            columns["model"].append(path)
            columns["posterior"].append(name)
            for key, value in values.items():
                columns.setdefault(key, []).append(f"{value:.2f}")
    return markdown(columns, set(columns) - {"model", "posterior"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="+")
    parser.add_argument("--test_file", required=True)
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--draws", type=int, default=8, help="of each step")
    parser.add_argument("--scored", type=int, default=100, help="draws of the score")
    parser.add_argument("--output", help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    command.run(parser, args, measure, report)


if __name__ == "__main__":
    main()
