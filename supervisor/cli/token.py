"""The command that makes tokens, or takes them back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from supervisor.cli.connect import choose, connected, key_file
from supervisor.cli.options import Json, SettingsModule, StateDir, parse_duration, split_words
from supervisor.cli.output import clean, print_json
from supervisor.cli.project import state_dir_for
from taskkit.errors import SettingsError


def token(
    actions: Annotated[
        str, typer.Option(metavar="LIST", help="Of submit, read, cancel, operate, logs.")
    ] = "submit,read,cancel,logs",
    runs: Annotated[
        str, typer.Option(metavar="LIST", help="Ids of runs, * for all, own for SUBJECT's.")
    ] = "*",
    tasks: Annotated[str, typer.Option(metavar="LIST", help="Patterns of task names.")] = "*",
    ttl: Annotated[str, typer.Option(metavar="DURATION", help="How long it is valid, such as 15m.")] = "12h",
    subject: Annotated[str, typer.Option(help="On whose behalf.")] = "",
    ticket: Annotated[
        bool,
        typer.Option(
            "--ticket", help="A ticket for a URL: good once within a minute, its session for --ttl."
        ),
    ] = False,
    revoke: Annotated[
        str | None, typer.Option(metavar="TOKEN", help="Take a token back, by its text or its jti.")
    ] = None,
    revoke_subject: Annotated[
        str | None, typer.Option(metavar="SUBJECT", help="Take back all that SUBJECT has until now.")
    ] = None,
    settings: SettingsModule = None,
    state_dir: StateDir = None,
    json: Json = False,
) -> None:
    """Print a token for the HTTP API, it is the last line; or take tokens back."""
    from taskkit import tokens  # jwt: 30 ms that the other commands do not need

    if revoke is not None or revoke_subject is not None:
        if revoke is not None and revoke_subject is not None:
            raise typer.BadParameter("give --revoke or --revoke-subject, one at a time")
        _revoke(revoke, revoke_subject, settings, state_dir, json=json)
        return
    lifetime = parse_duration(ttl)
    wanted = split_words(actions)
    if unknown := sorted(set(wanted) - tokens.ACTIONS):
        raise typer.BadParameter(
            f"unknown: {', '.join(unknown)}; there are {', '.join(sorted(tokens.ACTIONS))}"
        )
    if lifetime > tokens.MAX_LIFE:
        raise typer.BadParameter(f"{ttl!r}: a token may be valid for {tokens.MAX_LIFE / 86400:.0f} days")
    key = _key(settings, state_dir)
    reach = runs.strip()
    claims: dict[str, Any] = {
        "actions": wanted,
        "runs": reach if reach in ("*", tokens.OWN) else split_words(runs),
        "tasks": split_words(tasks),
        "subject": subject or f"uid-{os.getuid()}",
    }
    if ticket:
        try:
            text = tokens.issue_ticket(key, **claims, session=lifetime)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        lifetime = min(lifetime, tokens.TICKET_SECONDS)
    else:
        text = tokens.issue(key, **claims, ttl=lifetime)
    if json:
        print_json({"token": text, "id": _id_of(key, text), "expires_at": int(time.time() + lifetime)})
    else:
        print(text)


def _key(settings: str | None, state_dir: Path | None) -> bytes:
    from taskkit import tokens

    project = choose(settings, state_dir)
    place = state_dir_for(project, state_dir, exactly=False)
    path = key_file(project, place)
    if not path.parent.is_dir():
        raise SettingsError(f"{path.parent} does not exist, so no tree has made a key there; start one first")
    return tokens.load_or_create_key(path)


def _id_of(key: bytes, text: str) -> str:
    """Return the `jti` by which a token, ticket or session is taken back. Raises TokenError."""
    from taskkit import tokens

    try:
        return tokens.verify(key, text, uses=("token", "cookie")).id
    except tokens.TokenError as error:
        if error.code != "use":
            raise
        return tokens.read_ticket(key, text).claims.id


def _revoke(
    given: str | None, subject: str | None, settings: str | None, state_dir: Path | None, *, json: bool
) -> None:
    # A JWT begins so, whole or cut off; a `jti` of ours is a UUID, another issuer's may be any word.
    looks_like_one = given is not None and (given.startswith("eyJ") or "." in given)
    jti = _id_of(_key(settings, state_dir), given) if given and looks_like_one else given
    answer = connected(settings, state_dir).revoke(jti=jti, sub=subject)
    if json:
        print_json(answer)
        return
    what = f"what {subject} had until now"
    if jti is not None:
        what = f"token {jti}" if looks_like_one else f"whatever has the id {jti}"
    print(clean(f"Revoked {what}; streams ended: {answer['ended_streams']}."))
