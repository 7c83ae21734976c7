"""Requests to the Hub through huggingface_hub's session, and the errors that explain their failures.

huggingface_hub honours HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_OFFLINE and proxies, so surgeon does too.
"""

import errno
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import TypeVar

from surgeon.errors import HubError, first_line

LOGIN = "`hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(subject: str, *, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn every failure of huggingface_hub in this block into one HubError about `subject`.

    Only calls into huggingface_hub belong in the block: hf_xet raises a bare RuntimeError for every failed transfer,
    and huggingface_hub a ValueError for an answer that it cannot use.
    """
    from huggingface_hub.errors import EntryNotFoundError

    http = http_library()
    try:
        yield
    except (OSError, http.HTTPError, http.InvalidURL, EntryNotFoundError, RuntimeError, ValueError) as error:
        raise _explain(error, subject, repo_id, revision) from error


Result = TypeVar("Result")

# Asking again


TRIES = 6  # requests in a row that bring nothing
BACKOFF = (1.0, 2.0, 4.0, 8.0, 8.0)  # seconds before the second try and the next, as huggingface_hub waits
LONGEST_WAIT = 330.0  # seconds: the Hub counts requests in windows of 300
SLOWEST = 1024  # bytes a second on one connection; a slower one is given up, and the rest asked for again


class WrongAnswer(ValueError):  # noqa: N818  # it is told from errors of the transfer
    """An answer that is not the range that was asked for; `is_ignored`: it is the whole file."""

    def __init__(self, message: str, *, is_ignored: bool = False) -> None:
        super().__init__(message)
        self.is_ignored = is_ignored


def failures() -> tuple[type[Exception], ...]:
    """Return what a request can raise: of the network, of the Hub, and of a session that another thread closed."""
    http = http_library()
    return (http.HTTPError, http.InvalidURL, OSError, RuntimeError, ValueError)


def passes(error: Exception) -> bool:
    """Return whether the same request may succeed a little later."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    return isinstance(error, (http_library().TransportError, WrongAnswer)) or "client has been closed" in str(error)


def passes_at_first(error: Exception) -> bool:
    """Return the same for the first questions of a run: where no Hub can be reached then, there is no network."""
    http = http_library()
    return passes(error) and not isinstance(error, (http.ConnectError, http.ConnectTimeout))


def passes_for_get(error: Exception) -> bool:
    """Return the same for huggingface_hub's download of a file, which asks again by itself but for an answer to GET."""
    from huggingface_hub.errors import HfHubHTTPError

    return isinstance(error, HfHubHTTPError) and error.response.request.method == "GET" and passes(error)


def seconds_asked(error: Exception) -> float | None:
    """Return how long an answer asks to wait, None where it says nothing."""
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    if not isinstance(error, HfHubHTTPError) or error.response.status_code not in (429, 503):
        return None
    limit = parse_ratelimit_headers(error.response.headers)
    if limit is not None and limit.remaining == 0:
        return min(limit.reset_in_seconds + 1.0, LONGEST_WAIT)
    after = error.response.headers.get("Retry-After", "").strip()
    return min(float(after), LONGEST_WAIT) if after.isdigit() else None


def patiently(ask: Callable[[], Result], *, may_pass: Callable[[Exception], bool] = passes_at_first) -> Result:
    """Return what `ask` returns. It is asked again where its failure may pass; else, and in the end, that is raised."""
    for wait in BACKOFF:
        try:
            return ask()
        except failures() as error:
            if not may_pass(error):
                raise
            asked = seconds_asked(error)
            time.sleep(wait if asked is None else asked)
    return ask()


def not_too_slowly(chunks: Iterator[bytes], window: float) -> Iterator[bytes]:
    """Yield the chunks. Raises the HTTP library's ReadTimeout where they arrive more slowly than SLOWEST."""
    began, count = time.monotonic(), 0
    for chunk in chunks:
        count += len(chunk)
        yield chunk
        if (passed := time.monotonic() - began) > window:
            if count < SLOWEST * passed:
                raise http_library().ReadTimeout(f"{count} bytes in {passed:.0f} seconds")
            began, count = time.monotonic(), 0


def check_reachable(repo_id: str, file: str, revision: str | None) -> None:
    """Ask for a file that is not in the cache once, before huggingface_hub asks again and again for 44 seconds.

    Raises the error of its HTTP library where there is no connection: the name may be that of a directory, mistyped.
    Whatever else fails here is left to the download, which asks again where that may help.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(repo_id, file, revision=revision), str):
        return
    http = http_library()
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, file, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (http.ConnectError, http.ConnectTimeout):
        raise
    except failures():
        pass


# The beginning of a file


_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


def fetch_bytes(repo_id: str, file: str, *, commit: str, start: int, end: int) -> tuple[bytes, int]:
    """Return the bytes [start, end) of a file on the Hub (fewer if it ends before), and the file's size.

    A server that ignores ranges is read from the file's beginning to `end`. For a header, that is enough.
    """
    body = bytearray()

    def ask() -> int:
        return _ask_rest(repo_id, file, commit, body, start, end)

    with explained(f"{file} of {repo_id}", repo_id=repo_id, revision=commit):
        size = patiently(ask)
    return bytes(body), size


def _ask_rest(repo_id: str, file: str, commit: str, body: bytearray, start: int, end: int) -> int:
    """Return the file's size after adding to `body` what it lacks of the bytes [start, end)."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but exported by __getattr__
        build_hf_headers,
        hf_raise_for_status,
    )

    at = start + len(body)
    url = hf_hub_url(repo_id, file, revision=commit, endpoint=constants.ENDPOINT)
    headers = build_hf_headers() | {"Range": f"bytes={at}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
        if answer.status_code == 416:  # the file has no byte in the range
            return _size(answer.headers.get("Content-Range", ""), repo_id, file)
        hf_raise_for_status(answer)
        skip, last = at, end  # a server that ignores Range sends the file from its beginning
        length = answer.headers.get("Content-Length", "")
        if answer.status_code == 206:
            length = answer.headers.get("Content-Range", "")
            found = _CONTENT_RANGE.fullmatch(length)
            if found and (int(found[1]) != at or int(found[2]) >= end):
                raise WrongAnswer(f"{length} for the bytes {at} to {end}")
            skip, last = 0, int(found[2]) + 1 if found else end
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise WrongAnswer(f"a range compressed by {answer.headers['Content-Encoding']}")
        size = _size(length, repo_id, file)
        last = min(last, size)
        seen = 0
        for chunk in not_too_slowly(answer.iter_raw(), timeout):
            body += chunk[max(0, skip - seen) :][: last - start - len(body)]
            seen += len(chunk)
            if answer.status_code == 206 and seen > last - at:  # who sends too much may have sent other bytes
                del body[at - start :]
                raise WrongAnswer(f"more than the bytes {at} to {last}")
            if answer.status_code != 206 and start + len(body) == last:
                break
    if start + len(body) < min(end, size):
        raise http_library().RemoteProtocolError("the answer ended early")
    return size


def _size(stated: str, repo_id: str, file: str) -> int:
    """Return the size of a file, which ends what an answer states."""
    from huggingface_hub import constants

    size = stated.rpartition("/")[2]
    if not size.isdigit():
        raise HubError(
            f"{constants.ENDPOINT} does not give the size of {file} of {repo_id}",
            hint="Unset HF_ENDPOINT, or set it to an endpoint that answers as the Hub does.",
        )
    return int(size)


# Errors


def hide_progress_bars() -> None:
    """Disable huggingface_hub's progress bars where standard error is no terminal, unless the user has set them."""
    from huggingface_hub import constants

    if not sys.stderr.isatty() and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()


def http_library() -> ModuleType:
    """Return the HTTP library of the huggingface_hub that is installed: httpx for 1.x, httpx2 for 2.x."""
    from huggingface_hub import get_session

    return import_module(type(get_session()).__module__.partition(".")[0])


def _explain(error: Exception, subject: str, repo_id: str, revision: str | None) -> HubError:
    """Return the error for the user. The order matters: some of huggingface_hub's classes are subclasses of others."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    # These two only say that something failed; their cause says why.
    while isinstance(error, (hub.LocalEntryNotFoundError, RuntimeError)) and isinstance(error.__cause__, Exception):
        error = error.__cause__

    if isinstance(error, hub.HFValidationError):
        return HubError(
            f"{repo_id!r} is neither an existing directory nor a Hub id",
            hint="A Hub id is `name` or `owner/name`.",
        )
    if isinstance(error, hub.OfflineModeIsEnabled):
        return HubError(
            f"{subject} is not in the cache, and HF_HUB_OFFLINE is set",
            hint=f"Unset HF_HUB_OFFLINE once to fetch it (the cache is {constants.HF_HUB_CACHE}).",
        )
    if isinstance(error, hub.FileMetadataError):
        return HubError(
            f"{constants.ENDPOINT} does not answer as the Hub does",
            hint="Check HF_ENDPOINT, and that no proxy or login page answers in its place.",
        )
    if isinstance(error, hub.HfHubHTTPError):
        return _explain_answer(error, subject, repo_id, revision)
    return _explain_transport(error, subject)


def _explain_answer(error: Exception, subject: str, repo_id: str, revision: str | None) -> HubError:
    """Return the error for an answer of the Hub: by the reason that it gives, else by the HTTP status."""
    from huggingface_hub import constants, get_token
    from huggingface_hub import errors as hub

    assert isinstance(error, hub.HfHubHTTPError)
    page = f"{constants.ENDPOINT}/{repo_id}"
    login = f"log in with {LOGIN}" if get_token() is None else f"check the token in use: {LOGIN}"
    status = error.response.status_code
    if isinstance(error, hub.GatedRepoError):  # is a RepositoryNotFoundError too
        message = f"{repo_id} is gated, and you have not been granted access"
        hint = f"Ask for access on {page}, then {login}."
    elif isinstance(error, hub.RepositoryNotFoundError):
        message = f"the Hub has no model {repo_id}, or does not show it to you"
        hint = f"Check the name; if it is private, {login}."
    elif isinstance(error, hub.RevisionNotFoundError):
        message = f"{repo_id} has no revision {revision or 'main'!r}"
        hint = f"Its branches, tags and commits are listed on {page}/commits/main."
    elif isinstance(error, hub.RemoteEntryNotFoundError):
        message = f"the Hub has no {subject}"
        hint = f"Its files are listed on {page}/tree/{revision or 'main'}."
    elif isinstance(error, hub.DisabledRepoError):
        message, hint = f"{repo_id} has been disabled on the Hub", f"See {page}."
    elif status == 401:
        message, hint = f"the Hub wants a valid token for {subject}", f"To fix it, {login}."
    elif status == 403:
        message = f"your token has no permission for {subject}"
        hint = f"Use a token with that permission: {constants.ENDPOINT}/settings/tokens."
    elif status == 429:
        message, hint = f"the Hub refused {subject}: too many requests", "Wait a few minutes; a token raises the limit."
    elif status >= 500:
        message, hint = f"the Hub failed on {subject} with status {status}", "The fault is not yours: try again later."
    else:
        message = f"the Hub refused {subject} with status {status}: {error.server_message or 'it gave no reason'}"
        hint = f"See {page}."
    return HubError(message, hint=hint)


def _explain_transport(error: Exception, subject: str) -> HubError:
    """Return the error for a failed transfer: of the network, of the disk, or of a damaged file."""
    from huggingface_hub import constants

    http = http_library()
    unreachable = (http.ConnectError, http.ConnectTimeout, http.ProxyError, http.UnsupportedProtocol)
    again = "Run the command again; complete files are kept."
    if isinstance(error, (*unreachable, http.InvalidURL)):
        return HubError(
            f"cannot reach the Hub at {constants.ENDPOINT} for {subject}: {error}",
            hint="Check the network and HF_ENDPOINT; HF_HUB_OFFLINE=1 makes do with what is cached.",
        )
    if isinstance(error, http.TimeoutException):
        return HubError(f"the Hub stopped answering in the middle of {subject}", hint=again)
    if isinstance(error, http.HTTPError):
        return HubError(f"the connection broke off in the middle of {subject}", hint=again)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
        return HubError(
            f"the disk is full: no room for {subject} in {constants.HF_HUB_CACHE}",
            hint="Free some space, or set HF_HOME to a directory on a larger disk.",
        )
    if isinstance(error, OSError) and error.strerror:
        return HubError(
            f"{subject} failed: {error.strerror}: {error.filename}",
            hint=f"Check that path; the cache is {constants.HF_HUB_CACHE}, and HF_HOME moves it.",
        )
    return HubError(f"{subject} failed: {first_line(error)}", hint=again)
