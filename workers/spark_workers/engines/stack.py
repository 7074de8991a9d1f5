"""How much stack a guest may have. It runs on the stack of the thread that calls it, whose end is a crash."""

import resource

MOST = 1 << 20
_OURS = 8 << 20


def stack_bytes(wanted: int) -> int:
    """Return how many bytes of stack a guest may use: *wanted*, 1 MiB, or a quarter of ours, whichever is least.

    Where our own limit is small it is first raised as far as it may be; the main thread's stack grows to it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if soft != resource.RLIM_INFINITY and soft < _OURS:
        soft = _OURS if hard == resource.RLIM_INFINITY else min(_OURS, hard)
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))
    ours = _OURS if soft == resource.RLIM_INFINITY else soft
    return min(wanted, MOST, ours // 4)
