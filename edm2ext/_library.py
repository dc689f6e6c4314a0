"""Finds and loads the native library."""

LOADED = False
REASON = "it has not been built"


def has_kernel(op: str, device: str) -> bool:
    """Whether the native op has a kernel for a device type."""
    return False


def build_info() -> dict[str, object]:
    """What was built and loaded, and why."""
    return {"native": LOADED, "reason": REASON}
