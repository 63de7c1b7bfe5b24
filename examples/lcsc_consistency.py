"""LCSC (arXiv 2404.02241): a better consistency model from the checkpoints of its training, without training more.

python examples/lcsc_consistency.py [folder] [--images digits|mnist] [--smoke]
(pip install "jaxckpt[examples]"; two to four minutes on two cores)
A consistency model makes an image of noise in one evaluation. While it trains, the manager saves its whole state. Then
coefficients of the saved weights are searched for with which the images are nearest to the validation images, and are
judged beside other averages on images and a metric that chose nothing. Writes grid.png, search.png and `best`, the
searched model, to the folder.
"""

from __future__ import annotations

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from _lcsc_train import arguments, tiled, train
from matplotlib.image import imsave

import jaxckpt as jc
from jaxckpt import averaging, lcsc
from jaxckpt.lcsc.metrics import energy_distance, frechet_distance, moments
from models import classifier, consistency, diffusion, images

DECAYS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)


def main() -> int:
    args = arguments(__doc__)
    begin, end, budget, many = (100, 500, 151, 256) if args.smoke else (1000, 3000, 1024, 8192)
    data = images.load(args.images)
    config = diffusion.DenoiserConfig(side=data.side, width=48 if args.smoke else 192)
    root = args.folder / "run"
    like = train(root, config, jnp.asarray(data.train.pixels), begin, end).params
    with jc.CheckpointManager(root) as manager:
        steps = [step for step in manager.all_steps() if step > begin]
    read = {"like": like, "eval_params": lambda state: state.params}
    paths = [root / str(step) / "default" for step in steps]

    # The distance of images to real ones, by a classifier's features; energy distance of pixels shares nothing with it.
    features = classifier.features(data.side, classifier.train(data.train))
    sample = partial(consistency.sample, config)
    validation, test = (moments(part.pixels, features) for part in (data.validation, data.test))

    def distance(to, count, params, key):
        return frechet_distance(sample(params, key, count=count), to, features)

    def guard(params, key):
        return energy_distance(sample(params, key, count=many // 8), data.test.pixels)

    chooses, held_out = jax.jit(partial(distance, validation, many // 2)), jax.jit(partial(distance, test, many))
    score = partial(chooses, key=jax.random.key(1))
    found = lcsc.search(
        paths,
        partial(distance, validation, 512),
        budget=budget,
        validation=chooses,
        guard=guard,
        held_out=held_out,
        state=str(args.folder / "search"),
        record={"metric": "FD(classifier, 32 features)", "sampler": "consistency", "nfe": 1, "images": args.images},
        **read,
    )
    found.report.plot(args.folder / "search.png", steps=steps)
    one, profiles = np.eye(len(paths)), lcsc.profiles(len(paths), DECAYS)
    alone = [float(score(params)) for params in averaging.average(paths, one, **read)]
    ema = [float(score(params)) for params in averaging.average(paths, profiles, **read)]
    weights = {
        "last": one[-1],
        "best single": one[np.argmin(alone)],
        f"EMA {DECAYS[np.argmin(ema)]:g}, best of {len(DECAYS)}": profiles[np.argmin(ema)],
        "uniform": np.full(len(paths), 1 / len(paths)),
        "greedy soup": averaging.greedy_soup(paths, score, mode="min", scores=alone, **read).weights,
        f"LCSC, {found.report.evaluations} evaluations": np.asarray(found.coefficients),
    }
    models = averaging.average(paths, np.stack(list(weights.values())), **read)
    print(f"{len(paths)} checkpoints, one evaluation for an image; Fréchet distance by a classifier's features")
    print(f"{'':24} validation  held out  energy (guard)  sum |a|")
    key, tested = jax.random.key(2), []
    for (name, a), params in zip(weights.items(), models, strict=True):
        tested.append(float(held_out(params, key)))
        chosen_by, other = float(score(params)), float(jax.jit(guard)(params, key))
        print(f"{name:24} {chosen_by:10.3f} {tested[-1]:9.3f} {other:15.4f} {np.abs(a).sum():8.2f}")
    rows = [*(np.asarray(sample(params, jax.random.key(3), count=20)) for params in models), data.test.pixels[:20]]
    imsave(args.folder / "grid.png", tiled(rows), cmap="gray_r", vmin=-1, vmax=1)
    found.save(args.folder / "best", overwrite=True)  # with its lineage, and the report: strategy, seed and the record
    print(f"\n{args.folder / 'grid.png'}: a row for each line above, the last row is real; search.png: the search")
    return 0 if tested[-1] < tested[0] else 1


if __name__ == "__main__":
    sys.exit(main())
