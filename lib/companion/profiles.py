"""How much a notebook computes: the same program at laptop scale, colour scale and paper scale."""

from __future__ import annotations

from dataclasses import dataclass

from lib.system.errors import CompanionError, choose


@dataclass(frozen=True)
class Profile:
    """Data, images per class and repetitions of a run.

    Accuracies of a case are spread over ``sets`` distillations with ``networks`` freshly trained networks
    each, and the random baseline over ``random_draws`` draws: at one image per class single draws differ by
    ten points.
    """

    name: str
    cases: tuple[tuple[str, int], ...]  # (dataset, images per class)
    sets: int
    networks: int
    random_draws: int
    device: str
    description: str


PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "cpu",
            (("digits", 1), ("fashion14", 1)),
            3,
            2,
            8,
            "cpu",
            "a first look: about a minute on one core",
        ),
        Profile(
            "overnight",
            (("digits", 1), ("digits", 10), ("fashion14", 1), ("fashion14", 10)),
            5,
            3,
            8,
            "cpu",
            "schedules that flatten: minutes a notebook, a night for all on two cores",
        ),
        Profile(
            "paper",
            (("cifar10", 1), ("cifar10", 10), ("cifar10", 50)),
            5,
            20,
            5,
            "cuda",
            "CIFAR-10, on a GPU",
        ),
    )
}

# Images per class for a data set that is asked for by name without any: those that resolve differences.
DEFAULT_IPCS = {"digits": (1,), "fashion14": (1, 10), "photos16": (10,), "photos32": (1, 10)}
OTHER_IPCS = (1, 10)


def cases_of(
    profile: Profile, dataset: str | None = None, ipc: int | None = None
) -> tuple[tuple[str, int], ...]:
    """The (dataset, images per class) pairs to run: the profile's, unless ``dataset`` or ``ipc`` override
    them.

    A dataset alone keeps the profile's images per class for it, or takes that dataset's usual ones; images
    per class alone applies to every dataset of the profile.

    Raises:
        CompanionError: if ``ipc`` is not a whole number >= 1, or the dataset is unknown or has no settings for this profile.
    """
    if ipc is not None and (isinstance(ipc, bool) or not isinstance(ipc, int) or ipc < 1):
        raise CompanionError(f"ipc (images per class) must be a whole number >= 1, not {ipc!r}")
    if dataset is not None:
        check_dataset(dataset)
        if profile.name == "cpu" and dataset not in DEFAULT_IPCS and not dataset.startswith("folder:"):
            raise CompanionError(published_only(dataset))
    datasets = [dataset] if dataset is not None else list(dict.fromkeys(name for name, _ in profile.cases))
    cases = []
    for name in datasets:
        usual = tuple(n for known, n in profile.cases if known == name) or DEFAULT_IPCS.get(name, OTHER_IPCS)
        cases += [(name, n) for n in ((ipc,) if ipc is not None else usual)]
    return tuple(cases)


def published_only(dataset: str) -> str:
    """Why a data set is refused by the profiles for laptops, in one line."""
    return (
        f"{dataset} has no small settings, only the published ones, which take hours to days on a CPU: use --profile paper on a GPU, "
        f"or one of {', '.join(DEFAULT_IPCS)}, or images of at most 32 pixels and 20000 of them"
    )


def profile_named(name: str) -> Profile:
    """The profile of that name, or an error that lists them."""
    return choose("profile", name, PROFILES)


def check_dataset(name: str) -> None:
    """Refuse a data set that :func:`lib.data.load` would not know, before anything slow starts."""
    import lib.data

    lib.data.check(name)
