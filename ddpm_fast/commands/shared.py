"""What several commands do alike."""

import torch


def chosen_device(name: str) -> torch.device:
    """The device of that name, or "auto"; ValueError where it can't be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.device(name)
    except RuntimeError as error:  # whose text lists all that torch has ever run on
        raise ValueError(f"--device {name} can't be used here: expected cpu, cuda, cuda:1...") from error
    try:
        probe = torch.zeros(1, device=name)
        probe.cpu()  # "meta" holds no data
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--device {name} can't be used here: {text}") from error


def mapping(names: tuple[str, ...]) -> str:
    """'0 to 9', or '0 = cat, 1 = dog' where the names say more than the numbers."""
    if names == tuple(str(k) for k in range(len(names))):
        return f"0 to {len(names) - 1}"
    return ", ".join(f"{k} = {name}" for k, name in enumerate(names))
