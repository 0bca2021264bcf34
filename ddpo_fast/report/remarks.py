"""What is unusual about a run, in words, each with the options that help."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ddpo_fast.report.curves import stage_seconds
from ddpo_fast.report.run_records import RunRecords, image_count, number
from ddpo_fast.warning_limits import DRIFT_SHARE, FAR_LOG_RATIO, FIRST_EPOCHS, LEAST_VARIETY

# A difference of two means counts from this many standard errors on.
CLEAR = 2.5
# Epochs below which nothing is said about the course of a reward.
FEW_EPOCHS = 6
# Shares of an epoch's time from which waiting for the reward, and what is none of its stages, are remarked on.
LONG_WAIT, LONG_REST = 0.2, 0.3
# The share of ratios that are clipped, and of pairs without a gradient, from which a run learns little.
MOSTLY_CLIPPED, MOSTLY_DEAD = 0.9, 0.5
# A reward has reached a ceiling where the median of an epoch's images is this near to its highest, relative to the
# range of all epochs.
AT_CEILING = 0.01


@dataclass(frozen=True)
class Remark:
    """Something unusual.

    Args:
        title, text: what was seen, and what it means.
        options: of `ddpo-fast train`, each as (option, how it helps).
        is_serious: whether the result is likely to suffer from it.
    """

    title: str
    text: str
    options: tuple[tuple[str, str], ...] = ()
    is_serious: bool = True


def remarks_on(run: RunRecords) -> list[Remark]:
    """All remarks about a run, the serious ones first, without options that the run has already switched on."""
    found = [remark for rule in RULES for remark in rule(run)]
    found = [
        replace(remark, options=tuple(option for option in remark.options if not _is_on(run, option[0])))
        for remark in found
    ]
    return sorted(found, key=lambda remark: not remark.is_serious)


def _is_on(run: RunRecords, option: str) -> bool:
    name, _, value = option.removeprefix("--").partition(" ")
    return run.settings.get(name) in ((value,) if value else (True,))


def _unread(run: RunRecords) -> Iterator[Remark]:
    for problem in run.problems:
        yield Remark("Not everything could be read", f"{problem[0].upper()}{problem[1:]}.", (), False)
    if not run.epochs:
        yield Remark("No epoch has ended yet", "The run has just begun, or was stopped in its first epoch.", (), False)


def _variety(run: RunRecords) -> Iterator[Remark]:
    for name, what in (("image_spread", "images"), ("reward_spread", "rewards")):
        spreads = run.known(name)
        if len(spreads) <= FIRST_EPOCHS:
            continue
        first = sum(spreads[:FIRST_EPOCHS]) / FIRST_EPOCHS
        low = min(spreads[FIRST_EPOCHS:])
        if low < LEAST_VARIETY * first:
            least = "" if low == spreads[-1] else f", by {low:.2g} at the least,"
            yield Remark(
                f"The {what} of a prompt have become alike",
                f"They differed by {first:.2g} at the start{least} and by {spreads[-1]:.2g} at the end ({name}). The "
                "policy may have collapsed onto a few images; go on from an earlier checkpoint.",
                (
                    (
                        "--train_target_update",
                        "a smaller bound, or a smaller --train_learning_rate where it is not set",
                    ),
                    ("--train_kl_weight", "keeps the policy near the model before training"),
                    ("--train_guard", "goes back by itself when variety is lost"),
                ),
            )


def _no_spread(run: RunRecords) -> Iterator[Remark]:
    stds = run.known("reward_std")
    equal = sum(std == 0 for std in stds)
    if equal:
        yield Remark(
            f"All rewards were equal in {equal} of {len(stds)} epochs",
            "Without spread there is nothing to learn. See what the reward function returns for different images.",
            (
                ("--sample_num_batches_per_epoch", "more images an epoch"),
                ("--reward", "another reward, or a further one with a finer scale"),
            ),
        )


def _course(run: RunRecords) -> Iterator[Remark]:
    """Whether the reward rises, falls, or has come to rest."""
    means, errors = run.values("reward_mean"), _standard_errors(run)
    epochs = [int(record["epoch"]) + 1 for record in run.epochs]
    whole = [
        (mean, error, epoch)
        for mean, error, epoch in zip(means, errors, epochs, strict=True)
        if mean is not None and error is not None
    ]
    known = [(mean, error) for mean, error, _ in whole]
    if len(known) < FEW_EPOCHS:
        return
    third = len(known) // 3
    first, middle, last = (_average(part) for part in (known[:third], known[third:-third], known[-third:]))
    best_at = max(range(len(known)), key=lambda at: known[at][0])
    best = _average(known[max(0, best_at - third // 2) : best_at + third // 2 + 1])
    if _ceiling(run):
        return
    if _is_above(first, last):
        yield Remark(
            "The reward has fallen",
            f"It was {first[0]:.4g} in the first third of the epochs and {last[0]:.4g} in the last.",
            (
                ("--train_learning_rate", "a lower one, or a smaller --train_target_update"),
                ("--export best", "the best checkpoint becomes the final model"),
                ("--train_guard", "goes back to the best weights when the reward falls"),
            ),
        )
    elif _is_above(best, last) and best_at < len(known) - third:
        yield Remark(
            "The reward was better before the end",
            f"It was {best[0]:.4g} around epoch {whole[best_at][2]}, and {last[0]:.4g} in the last third of them all.",
            (
                ("--export best", "the best checkpoint becomes the final model"),
                ("--early_stopping_patience", "ends a run whose best epoch is long ago"),
                ("--train_guard", "goes back to the best weights when the reward falls"),
            ),
        )
    elif not _is_above(last, first):
        yield Remark(
            "The reward has not clearly risen",
            f"It was {first[0]:.4g} in the first third of the epochs and {last[0]:.4g} in the last, which is within "
            f"{CLEAR:g} standard errors.",
            (
                ("--num_epochs", "more of them: this may be too early to tell"),
                ("--sample_num_batches_per_epoch", "more images an epoch, for less noise"),
                ("--recipe", "the settings of a recipe, or a higher --train_learning_rate"),
            ),
        )
    elif _is_above(middle, first) and not _is_above(last, middle) and len(known) >= 3 * FEW_EPOCHS:
        yield Remark(
            "The reward has come to rest",
            f"It rose from {first[0]:.4g} to {middle[0]:.4g} by the middle of the run, and was {last[0]:.4g} in the "
            "last third of the epochs.",
            (
                ("--early_stopping_patience", "ends a run that no longer improves"),
                ("--train_lr_scheduler", "a learning rate that falls, such as cosine"),
            ),
            is_serious=False,
        )


def _saturated(run: RunRecords) -> Iterator[Remark]:
    if _ceiling(run):
        yield Remark(
            "The reward is saturated",
            f"Half of the images of the last epoch have its highest reward, {run.known('reward_max')[-1]:.4g}. What is "
            "left to learn shows in few images, and further training mostly costs variety.",
            (
                ("--reward", "a reward with a finer scale, or a second one beside it"),
                ("--prompts", "prompts that are harder for this reward"),
                ("--early_stopping_patience", "ends a run that no longer improves"),
            ),
        )


def _held_out(run: RunRecords) -> Iterator[Remark]:
    known = run.known("reward_mean")
    for name in run.names("eval"):
        points = []
        for record in run.evaluations:
            mean, std = (number(record.get(f"{name}_{moment}")) for moment in ("mean", "std"))
            if mean is not None and std is not None:
                points.append((mean, std / math.sqrt(image_count(record))))
        if len(points) >= 3 and len(known) >= FEW_EPOCHS and known[-1] > known[0]:
            best = max(points, key=lambda point: point[0])
            if _is_above(best, points[-1]):
                yield Remark(
                    f"The held-out reward {name.partition('/')[2]} falls while that of training rises",
                    f"It was {best[0]:.4g} at its best and {points[-1][0]:.4g} at the end: the policy may exploit the "
                    "reward that it is trained on.",
                    (
                        ("--export best", "the checkpoint with the best held-out reward becomes the final model"),
                        ("--train_kl_weight", "keeps the policy near the model before training"),
                    ),
                )


def _components(run: RunRecords) -> Iterator[Remark]:
    for name in run.names("reward"):
        means = run.known(f"{name}_mean")
        stds = run.known(f"{name}_std")
        if len(means) < FEW_EPOCHS or not stds:
            continue
        third = len(means) // 3
        first, last = sum(means[:third]) / third, sum(means[-third:]) / third
        # half a standard deviation of the images: a fall that can be seen in them
        if first - last > 0.5 * sum(stds[:third]) / third:
            yield Remark(
                f"One of the rewards has fallen: {name.partition('/')[2]}",
                f"It went from {first:.4g} to {last:.4g}, while the sum of the rewards is trained on.",
                (("--reward", "a larger weight for it, as in --reward one:1,other:2"),),
            )


def _drift(run: RunRecords) -> Iterator[Remark]:
    drifts, clip_range = run.known("ratio_drift"), run.clip_range
    # with `ema_sampling` other weights have sampled, and the ratio is no measure of rounding
    if not drifts or not clip_range or run.settings.get("ema_sampling"):
        return
    over = sum(drift > DRIFT_SHARE * clip_range for drift in drifts)
    if over:
        yield Remark(
            "The ratio drift is near the clip range",
            f"Before an epoch's first update a ratio was up to {max(drifts):.1e} away from 1, and the clip range is "
            f"{clip_range:.1e} (in {over} of {len(drifts)} epochs more than half of it). So rounding decides which "
            "pairs are clipped.",
            (
                ("--train_recompute_log_probs", "scores the samples by training's own forward pass"),
                ("--mixed_precision", "a higher precision; no (fp32) rounds least"),
                ("--train_clip_range", "a wider one"),
            ),
        )


def _far(run: RunRecords) -> Iterator[Remark]:
    kls = run.known("approx_kl")
    limit = max(FAR_LOG_RATIO, 10 * (run.clip_range or 0)) ** 2 / 2
    far = sum(kl > limit for kl in kls)
    if far:
        yield Remark(
            f"The policy moved far from the one that sampled in {far} of {len(kls)} updates",
            f"The KL estimate reached {max(kls):.2g}. PPO assumes that an epoch's updates are small.",
            (
                ("--train_learning_rate", "a lower one, or --train_target_update"),
                ("--train_num_inner_epochs", "fewer passes over an epoch's images"),
            ),
        )


def _clipped(run: RunRecords) -> Iterator[Remark]:
    shares = _last_third(run.known("clipfrac"))
    if shares and (share := sum(shares) / len(shares)) > MOSTLY_CLIPPED:
        yield Remark(
            f"{share:.0%} of the ratios are outside of the clip range",
            "Most of their pairs have no gradient, so that hardly anything is learned.",
            (
                ("--train_clip_range", "a wider one; --train_clip_unit step depends less on the images' size"),
                ("--train_learning_rate", "a lower one"),
            ),
        )


def _dead(run: RunRecords) -> Iterator[Remark]:
    shares = _last_third(run.known("zero_gradient"))
    if shares and (share := sum(shares) / len(shares)) > MOSTLY_DEAD:
        yield Remark(
            f"{share:.0%} of the pairs have no gradient",
            "Their image's advantage is 0, as all rewards of its group are equal, or their ratio is clipped.",
            (
                ("--sample_redraws", "draws groups again whose rewards are all equal"),
                ("--train_clip_range", "a wider one, if the share of clipped ratios is high too"),
            ),
            is_serious=False,
        )


def _waits(run: RunRecords) -> Iterator[Remark]:
    shares = stage_shares(run)
    if shares.get("reward_s", 0) > LONG_WAIT:
        yield Remark(
            f"The device waits for the reward {shares['reward_s']:.0%} of the time",
            "This is the part of scoring that does not run beside sampling.",
            (
                ("--sample_num_batches_per_epoch", "more and smaller batches: one is scored while the next is sampled"),
                ("--async_reward_computation", "with --max_workers, if the reward mostly waits for a server"),
                ("--reward_device", "another device for the reward's network, or --reward_process"),
            ),
            is_serious=False,
        )
    if shares.get("other", 0) > LONG_REST:
        yield Remark(
            f"{shares['other']:.0%} of the time goes into checkpoints and evaluations",
            "It is spent between the end of one epoch and the start of the next.",
            (
                ("--save_freq", "fewer checkpoints"),
                ("--eval_freq", "fewer evaluations, or fewer --eval_num_images"),
                ("--sample_freq", "images to look at less often, or fewer --sample_num_images"),
            ),
            is_serious=False,
        )


Rule = Callable[[RunRecords], Iterator[Remark]]


def _of_one_size(rule: Rule) -> Rule:
    """The rule for the images of the run's first size, as those of different sizes cannot be compared."""
    return lambda run: rule(run.by_size()[0])


RULES: tuple[Rule, ...] = (
    _unread,
    _of_one_size(_variety),
    _no_spread,
    _of_one_size(_saturated),
    _of_one_size(_course),
    _of_one_size(_held_out),
    _of_one_size(_components),
    _drift,
    _far,
    _clipped,
    _dead,
    _waits,
)


def stage_shares(run: RunRecords) -> dict[str, float]:
    """The share of each stage in the time of all epochs whose stages are known; the first, which warms up, aside."""
    seconds = stage_seconds(run)
    sums = {
        name: sum(value for value in values[len(values) > 1 :] if value is not None) for name, values in seconds.items()
    }
    total = sum(sums.values())
    return {name: value / total for name, value in sums.items()} if total > 0 else {}


def _ceiling(run: RunRecords) -> bool:
    medians, highest, lowest = (run.known(f"reward_{name}") for name in ("median", "max", "min"))
    if not medians or not highest or not lowest or len(medians) < FIRST_EPOCHS + 1:
        return False
    span = max(highest) - min(lowest)
    return span > 0 and max(highest) - medians[-1] <= AT_CEILING * span


def _standard_errors(run: RunRecords) -> list[float | None]:
    stds = run.values("reward_std")
    counts = map(image_count, run.epochs)
    return [None if std is None else std / math.sqrt(count) for std, count in zip(stds, counts, strict=True)]


def _average(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The mean of means, and its standard error."""
    count = len(points)
    return sum(mean for mean, _ in points) / count, math.sqrt(sum(error**2 for _, error in points)) / count


def _is_above(one: tuple[float, float], two: tuple[float, float]) -> bool:
    return one[0] - two[0] > CLEAR * math.hypot(one[1], two[1])


def _last_third(values: Sequence[float]) -> Sequence[float]:
    return values[-max(1, len(values) // 3) :]
