"""What every setting's check is made of. Imports no torch."""


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: the key or file, the value, the mend."""

    status = 2
    """The exit status of a verb that ends with it."""


class Fault(InputError):
    """What this process's machine ran out of; other processes of the same training may not have."""


class Hopeless(InputError):
    """A training that its own health verdict ended and that has no result; again, it would end the same way."""

    status = 3


def require(holds: bool, key: str, value: object, mend: str) -> None:
    if not holds:
        raise InputError(f"{key}={value}: {mend}")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    require(value in choices, key, value, f"choose one of {', '.join(choices)}")
