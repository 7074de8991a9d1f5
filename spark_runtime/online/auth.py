"""The headers that say who calls."""

import asyncio
from collections.abc import Mapping
from typing import Any

from spark_runtime.config import Endpoint
from spark_runtime.errors import BadRequestError
from spark_runtime.online.given import value_of

KEY_HEADER, TENANT_HEADER, TOKEN_HEADER = "x-synthetic-key", "x-tenant-name", "Authorization"


def auth_headers(
    endpoint: Endpoint, seconds: float | None = None, loop: asyncio.AbstractEventLoop | None = None
) -> dict[str, str]:
    """Return the headers for one call; a function for the credential is called, once.

    Args:
        seconds: How long the function may take.
        loop: Where an async one runs.

    Raises:
        BadRequestError: The function failed, or returned no text that can be sent.
        TimeoutError: It took too long.
    """
    if endpoint.auth == "public":
        return {}
    try:
        credential = value_of(endpoint.credential, seconds=seconds, loop=loop)
    except TimeoutError:
        raise
    except Exception as problem:
        text = f"the function for the {endpoint.auth} failed: {type(problem).__name__}: {problem}"
        raise BadRequestError(text) from problem
    if endpoint.auth == "syntheticKey":
        return {KEY_HEADER: _sendable(credential, endpoint.auth), TENANT_HEADER: endpoint.tenant}
    return {TOKEN_HEADER: f"Bearer {_bare(_sendable(credential, endpoint.auth))}"}


def context_headers(context: Mapping[str, Any], tenant: str) -> dict[str, str] | None:
    """Return the headers for a call that a model makes: its caller's own credentials; None if it brought none.

    Raises:
        BadRequestError: They cannot be sent.
    """
    key, token = context.get("x-synthetic-key"), context.get("authorization")
    if key:
        return {KEY_HEADER: _sendable(key, "_ctx x-synthetic-key"), TENANT_HEADER: tenant}
    if token:
        return {TOKEN_HEADER: f"Bearer {_bare(_sendable(token, '_ctx authorization'))}"}
    return None


def _sendable(credential: Any, what: str) -> str:
    """Return a credential that can be a header. The message never shows it."""
    if not isinstance(credential, str) or not credential.strip():
        raise BadRequestError(f"the {what} is {type(credential).__name__}, not a text with something in it")
    found = credential.strip()
    if not (found.isascii() and found.isprintable()):
        raise BadRequestError(f"the {what} has characters in it that cannot be sent, such as a line break")
    return found


def _bare(token: str) -> str:
    """Return a token without the word that goes before it: many keep them together."""
    return token[7:].lstrip() if token[:7].lower() == "bearer " else token
