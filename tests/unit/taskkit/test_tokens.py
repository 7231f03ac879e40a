"""Tokens: what they allow, what is no token, where their key comes from."""

from __future__ import annotations

import base64
import json
import os
import random
import threading
from pathlib import Path
from typing import Any

import jwt
import pytest

from taskkit.errors import SettingsError
from taskkit.tokens import (
    ACTIONS,
    AUDIENCE,
    KEY_BYTES,
    MAX_LIFE,
    MAX_TICKET,
    TokenError,
    issue,
    issue_ticket,
    key_id,
    load_or_create_key,
    read_ticket,
    session_of,
    verify,
)

KEY = bytes(range(KEY_BYTES))
NOW = 1_800_000_000.0
RUN = "01890000-0000-7000-8000-000000000000"


def forge(payload: dict[str, Any], key: Any = KEY, algorithm: str = "HS256", **headers: Any) -> str:
    return jwt.encode(payload, key, algorithm=algorithm, headers=headers)


def usual(**claims: Any) -> dict[str, Any]:
    return {"aud": AUDIENCE, "exp": NOW + 60, "sub": "ann", **claims}


def refused(token: str, now: float = NOW, key: bytes = KEY) -> str:
    with pytest.raises(TokenError) as caught:
        verify(key, token, now)
    assert token == "" or token not in str(caught.value)
    return caught.value.code


class TestClaims:
    def test_a_token_says_what_was_issued(self) -> None:
        token = issue(
            KEY, actions=["read", "cancel"], runs=[RUN], tasks=["demo.*"], ttl=60, subject="ann", now=NOW
        )
        claims = verify(KEY, token, NOW)
        assert claims.subject == "ann"
        assert claims.expires_at == NOW + 60
        assert claims.actions == {"read", "cancel"}
        assert claims.runs == frozenset({RUN})
        assert claims.tasks == ("demo.*",)
        assert claims.id
        assert jwt.get_unverified_header(token)["kid"] == key_id(KEY)

    def test_every_token_has_an_id_of_its_own(self) -> None:
        one, two = (verify(KEY, issue(KEY, actions=[], ttl=60, subject="ann")) for _ in range(2))
        assert one.id != two.id

    def test_a_missing_claim_grants_nothing(self) -> None:
        claims = verify(KEY, forge({"aud": AUDIENCE, "exp": NOW + 1}), NOW)
        assert not any(claims.may(action) for action in ACTIONS)
        assert not claims.sees_run(RUN, "demo.count")
        assert not claims.may_submit("demo.count")
        assert claims.subject == ""

    @pytest.mark.parametrize(
        ("runs", "tasks", "sees"),
        [
            ("*", [], True),
            ([RUN], [], True),
            ([], ["demo.*"], True),
            ([], ["*"], True),
            ([], ["demo.count"], True),
            ([], ["demo.Count"], False),
            ([], ["demo"], False),
            (["*"], [], False),
            ([RUN[:-1] + "1"], ["other.*"], False),
        ],
    )
    def test_a_run_is_seen_by_id_or_by_task(self, runs: Any, tasks: list[str], sees: bool) -> None:
        claims = verify(KEY, issue(KEY, actions=["read"], runs=runs, tasks=tasks, ttl=60, subject=""))
        assert claims.sees_run(RUN, "demo.count") is sees

    @pytest.mark.parametrize(
        ("actions", "tasks", "may"),
        [(["submit"], ["demo.*"], True), (["submit"], [], False), (["read"], ["demo.*"], False)],
    )
    def test_submitting_needs_the_action_and_the_task(
        self, actions: list[str], tasks: list[str], may: bool
    ) -> None:
        claims = verify(KEY, issue(KEY, actions=actions, runs="*", tasks=tasks, ttl=60, subject=""))
        assert claims.may_submit("demo.count") is may

    def test_an_action_of_the_future_is_passed_over(self) -> None:
        assert verify(KEY, forge(usual(actions=["read", "fly"])), NOW).actions == {"read"}

    def test_an_audience_may_be_one_of_several(self) -> None:
        assert verify(KEY, forge(usual(aud=["other", AUDIENCE])), NOW).subject == "ann"

    @pytest.mark.parametrize(("actions", "ttl"), [(["fly"], 60), (["read"], 0), (["read"], -1)])
    def test_nonsense_is_not_issued(self, actions: list[str], ttl: float) -> None:
        with pytest.raises(ValueError):
            issue(KEY, actions=actions, ttl=ttl, subject="ann")


class TestRefusals:
    def test_no_token(self) -> None:
        assert refused("") == "missing"

    @pytest.mark.parametrize("token", ["x", "a.b.c", "....", "\ud800", "é.é.é", "x" * 10_000])
    def test_not_a_token(self, token: str) -> None:
        assert refused(token) == "malformed"

    def test_deep_json_is_malformed(self) -> None:
        deep = base64.urlsafe_b64encode(b"[" * 3000).decode().rstrip("=")
        assert refused(f"{deep}.{deep}.") == "malformed"

    def test_another_key(self) -> None:
        assert refused(issue(b"x" * 32, actions=["read"], ttl=60, subject="ann", now=NOW)) == "signature"

    def test_algorithm_none(self) -> None:
        assert refused(forge(usual(actions=["read"]), None, "none")) == "signature"

    def test_another_algorithm_with_the_same_key(self) -> None:
        assert refused(forge(usual(), KEY * 2, "HS512"), key=KEY * 2) == "signature"

    @pytest.mark.parametrize("aud", ["other", ["other"], None])
    def test_another_audience(self, aud: Any) -> None:
        payload = {name: value for name, value in usual(aud=aud).items() if value is not None}
        assert refused(forge(payload)) == "audience"

    def test_expiry_has_no_leeway(self) -> None:
        token = issue(KEY, actions=[], ttl=60, subject="ann", now=NOW)
        verify(KEY, token, NOW + 59.9)
        assert refused(token, NOW + 60) == "expired"

    def test_the_issuers_clock_may_be_5_seconds_ahead(self) -> None:
        token = forge(usual(nbf=NOW + 5))
        verify(KEY, token, NOW)
        assert refused(token, NOW - 1) == "claims"

    def test_a_clock_that_was_set_back_voids_no_token(self) -> None:
        verify(KEY, forge(usual(iat=NOW + 3600)), NOW)

    @pytest.mark.parametrize(
        "claims",
        [
            {"exp": None},
            {"exp": True},
            {"exp": "soon"},
            {"exp": float("nan")},
            {"exp": float("inf")},
            {"exp": [1]},
            {"iat": {}},
            {"sub": 7},
            {"jti": ["x"]},
            {"actions": "read"},
            {"actions": [1]},
            {"runs": "all"},
            {"runs": {RUN: 1}},
            {"tasks": "*"},
            {"tasks": [None]},
        ],
    )
    def test_a_claim_of_another_shape(self, claims: dict[str, Any]) -> None:
        payload = {name: value for name, value in usual(**claims).items() if value is not None}
        assert refused(sign_raw(payload)) == "claims"

    def test_the_clock_is_the_default(self) -> None:
        verify(KEY, issue(KEY, actions=[], ttl=60, subject="ann"))
        with pytest.raises(TokenError):
            verify(KEY, issue(KEY, actions=[], ttl=60, subject="ann", now=NOW - 1e9))

    def test_fuzz_any_text_is_accepted_or_a_token_error(self) -> None:
        seed = random.SystemRandom().randrange(1 << 32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        token = issue(KEY, actions=["read"], runs="*", ttl=60, subject="ann", now=NOW)
        for _ in range(3000):
            changed = mutate(rng, token)
            try:
                verify(KEY, changed, NOW)
            except TokenError:
                continue
            # Base64 leaves a few bits of the last character unused; those may differ, nothing else.
            assert signed_bytes(changed) == signed_bytes(token)

    def test_fuzz_any_signed_payload_is_accepted_or_a_token_error(self) -> None:
        seed = random.SystemRandom().randrange(1 << 32)
        print(f"seed {seed}")
        rng = random.Random(seed)
        values: list[Any] = [
            None,
            0,
            -1,
            1e308,
            "",
            "*",
            "read",
            [],
            ["read"],
            [[]],
            {},
            True,
            "9" * 400,
            10**400,
        ]
        names = ["aud", "exp", "nbf", "iat", "sub", "jti", "actions", "runs", "tasks", "iss"]
        for _ in range(2000):
            payload = usual(**{rng.choice(names): rng.choice(values) for _ in range(3)})
            try:
                claims = verify(KEY, sign_raw(payload), NOW)
            except TokenError:
                continue
            assert claims.actions <= ACTIONS
            assert claims.runs == "*" or isinstance(claims.runs, frozenset)


def sign_raw(payload: dict[str, Any]) -> str:
    """Sign a payload that PyJWT would not encode."""
    return jwt.api_jws.encode(json.dumps(payload).encode(), KEY, algorithm="HS256")


def mutate(rng: random.Random, token: str) -> str:
    at = rng.randrange(len(token))
    match rng.randrange(5):
        case 0:
            return token[:at] + rng.choice("aZ09-_.=é\0 ") + token[at + 1 :]
        case 1:
            return token[:at]
        case 2:
            return token[:at] + token[at + rng.randrange(20) :]
        case 3:
            parts = token.split(".")
            rng.shuffle(parts)
            return ".".join(parts)
        case _:
            return "".join(chr(rng.randrange(1, 0x3000)) for _ in range(rng.randrange(60)))


def signed_bytes(token: str) -> list[bytes]:
    return [base64.urlsafe_b64decode(part + "==") for part in token.split(".")]


class TestKey:
    def test_the_first_start_makes_a_key(self, tmp_path: Path) -> None:
        path = tmp_path / "key"
        key = load_or_create_key(path)
        assert len(key) == KEY_BYTES
        assert path.stat().st_mode & 0o777 == 0o600
        assert base64.urlsafe_b64decode(path.read_text().removesuffix("\n") + "=") == key
        assert os.listdir(tmp_path) == ["key"]
        assert load_or_create_key(path) == key

    def test_the_umask_does_not_matter(self, tmp_path: Path) -> None:
        before = os.umask(0)
        try:
            load_or_create_key(tmp_path / "key")
        finally:
            os.umask(before)
        assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600

    def test_creators_at_the_same_time_get_the_same_key(self, tmp_path: Path) -> None:
        for attempt in range(10):
            barrier = threading.Barrier(8)
            keys: list[bytes] = []
            path = tmp_path / f"key{attempt}"

            def create(path: Path = path, barrier: threading.Barrier = barrier, keys: Any = keys) -> None:
                barrier.wait(10)
                keys.append(load_or_create_key(path))

            threads = [threading.Thread(target=create) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
            assert len(keys) == 8
            assert len(set(keys)) == 1

    @pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
    def test_its_group_may_read_it(self, tmp_path: Path, mode: int) -> None:
        key = load_or_create_key(tmp_path / "key")
        (tmp_path / "key").chmod(mode)
        assert load_or_create_key(tmp_path / "key") == key

    @pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o660, 0o602, 0o666])
    def test_nobody_else_may(self, tmp_path: Path, mode: int) -> None:
        load_or_create_key(tmp_path / "key")
        (tmp_path / "key").chmod(mode)
        with pytest.raises(SettingsError, match=rf"KEY_FILE = .*{mode:04o}.*chmod 600"):
            load_or_create_key(tmp_path / "key")

    @pytest.mark.parametrize("text", ["", "short\n", "!" * 60, "ä" * 60, "A" * 20])
    def test_a_file_without_a_key_is_refused(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "key").write_text(text)
        (tmp_path / "key").chmod(0o600)
        with pytest.raises(SettingsError, match="holds no key"):
            load_or_create_key(tmp_path / "key")
        assert (tmp_path / "key").read_text() == text

    def test_a_directory_that_is_not_there_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(SettingsError, match=r"KEY_FILE = .*nowhere/key.*No such file"):
            load_or_create_key(tmp_path / "nowhere" / "key")

    def test_a_fifo_does_not_hang_it(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "key", 0o600)
        with pytest.raises(SettingsError, match="no regular file"):
            load_or_create_key(tmp_path / "key")


class TestTickets:
    def test_a_ticket_says_what_its_session_may(self) -> None:
        text = issue_ticket(
            KEY, actions=["read"], runs=[RUN], tasks=["a.*"], session=100, subject="ann", parent="p", now=NOW
        )
        ticket = read_ticket(KEY, text, NOW)
        claims = ticket.claims
        assert (claims.subject, claims.id, claims.runs, claims.tasks) == ("ann", "p", {RUN}, ("a.*",))
        assert (ticket.valid_until, claims.expires_at, claims.issued_at) == (NOW + 60, NOW + 100, NOW)
        assert jwt.get_unverified_header(text)["kid"] == key_id(KEY)

    def test_a_short_session_shortens_its_ticket(self) -> None:
        ticket = read_ticket(KEY, issue_ticket(KEY, session=10, subject="ann", now=NOW), NOW)
        assert (ticket.valid_until, ticket.claims.expires_at, ticket.claims.id) == (
            NOW + 10,
            NOW + 10,
            ticket.id,
        )

    def test_one_that_is_over_is_read_all_the_same(self) -> None:
        text = issue_ticket(KEY, subject="ann", now=NOW)
        assert read_ticket(KEY, text, NOW + 3000).valid_until == NOW + 60

    def test_nobody_makes_one_that_is_good_for_longer(self) -> None:
        usual_ticket = usual(use="ticket", jti="t", iat=NOW, until=NOW + 900, exp=NOW + 900)
        assert read_ticket(KEY, forge(usual_ticket), NOW).valid_until == NOW + 60
        with pytest.raises(TokenError, match="`iat` is in the future"):
            read_ticket(KEY, forge(usual_ticket | {"iat": NOW + 800}), NOW)

    @pytest.mark.parametrize("lacking", ["jti", "until", "exp"])
    def test_what_it_has_to_say(self, lacking: str) -> None:
        payload = usual(use="ticket", jti="t", iat=NOW, until=NOW + 900)
        del payload[lacking]
        with pytest.raises(TokenError) as caught:
            read_ticket(KEY, forge(payload), NOW)
        assert caught.value.code == "claims"

    def test_token_ticket_and_session_do_not_stand_for_each_other(self) -> None:
        token = issue(KEY, actions=["read"], ttl=60, subject="ann", now=NOW)
        ticket = issue_ticket(KEY, subject="ann", now=NOW)
        session = session_of(KEY, verify(KEY, token, NOW), NOW)
        assert refused(ticket) == refused(session) == "use"
        assert refused(forge(usual(use=["token"]))) == "use"
        for text in (token, session):
            with pytest.raises(TokenError) as caught:
                read_ticket(KEY, text, NOW)
            assert caught.value.code == "use"
        assert verify(KEY, session, NOW, uses=("token", "cookie")).subject == "ann"

    def test_it_has_to_fit_into_a_cookie(self) -> None:
        runs = [f"01890000-0000-7000-8000-{n:012d}" for n in range(60)]
        assert len(issue_ticket(KEY, runs=runs[:30], subject="ann")) <= MAX_TICKET
        with pytest.raises(ValueError, match="too long for one"):
            issue_ticket(KEY, runs=runs, subject="ann")


class TestLife:
    def test_nothing_is_valid_for_longer_than_a_revocation_is_remembered(self) -> None:
        with pytest.raises(ValueError, match="at most"):
            issue(KEY, actions=["read"], ttl=MAX_LIFE + 1, subject="ann")
        assert refused(forge(usual(exp=NOW + MAX_LIFE + 60))) == "claims"
        assert verify(KEY, forge(usual(exp=NOW + MAX_LIFE)), NOW).subject == "ann"

    def test_a_token_tells_when_it_was_issued_to_the_millisecond(self) -> None:
        token = issue(KEY, actions=["read"], ttl=60, subject="ann", now=NOW + 0.25)
        assert verify(KEY, token, NOW + 1).issued_at == NOW + 0.25
        assert verify(KEY, forge(usual()), NOW).issued_at == 0.0

    def test_own_runs_are_those_of_the_subject(self) -> None:
        claims = verify(KEY, issue(KEY, actions=["read"], runs="own", ttl=60, subject="ann"))
        assert claims.sees_run("r", "t", "ann")
        assert not claims.sees_run("r", "t", "bob")
        assert not claims.sees_run("r", "t"), "of nobody"
        assert not claims.sees_run("own", "t")
