"""How sources look, step by step: what they ask, when they look again, and what they make of silence."""

import os
from pathlib import Path

from ft_launcher.metadata_http import Answer, Request, Unanswered
from ft_launcher.notices import Clear, Instant, Notice, SourceError
from ft_launcher.preemption_sources import SLOWEST, AwsSpot, Azure, File, Gcp, Look, Steps, Woken

AGAIN = Woken(acknowledge=False)


class Time:
    """The moments at which answers come: a service that takes no time, until the test lets some pass."""

    def __init__(self) -> None:
        self.now = 1000.0

    def answer(self, status: int, body: bytes = b"", *, seconds: float = 0.0, **headers: str) -> Answer:
        self.now += seconds
        return Answer(status, headers, body, Instant(self.now, self.now + 1e9), seconds)


def asked(steps: Steps, sent: Answer | Unanswered | Woken | None = None) -> Request:
    wish = next(steps) if sent is None else steps.send(sent)
    assert isinstance(wish, Request), wish
    return wish


def found(steps: Steps, sent: Answer | Unanswered | Woken) -> Look:
    look = steps.send(sent)
    assert isinstance(look, Look), look
    return look


def test_a_source_that_fails_is_asked_less_and_less_often_until_it_answers() -> None:
    steps, time = AwsSpot().steps(), Time()
    asked(steps)
    pauses = []
    for _ in range(5):
        look = found(steps, Unanswered("refused the connection"))
        assert isinstance(look.state, SourceError)
        pauses.append(look.seconds)
        asked(steps, AGAIN)
    assert pauses == [5, 10, 20, SLOWEST, SLOWEST]
    asked(steps, time.answer(200, b"token"))
    assert found(steps, time.answer(404)) == Look(Clear(), 5)
    asked(steps, AGAIN)
    assert found(steps, time.answer(500)).seconds == 5


def test_a_source_that_fails_for_weeks_is_still_asked() -> None:
    steps = Gcp().steps()
    asked(steps)
    for _ in range(100_000):
        assert found(steps, Unanswered("refused the connection")).seconds <= SLOWEST
        asked(steps, AGAIN)


def test_P1_a_token_is_asked_for_once_and_anew_before_it_ends() -> None:
    steps, time = AwsSpot(token_seconds=17, interval=5).steps(), Time()
    put = asked(steps)
    assert (put.method, dict(put.headers)) == ("PUT", {"X-aws-ec2-metadata-token-ttl-seconds": "17"})
    get = asked(steps, time.answer(200, b"first=="))
    assert (get.method, dict(get.headers)) == ("GET", {"X-aws-ec2-metadata-token": "first=="})
    methods = []
    for _ in range(4):
        assert found(steps, time.answer(404)).state == Clear()
        time.now += 5
        methods.append(asked(steps, AGAIN).method)
    assert methods == ["GET", "GET", "GET", "PUT"]  # at 5, 10, 15 and 20 s


def test_P1_a_refused_token_is_renewed_once_then_it_is_an_error_and_the_next_look_begins_anew() -> None:
    steps, time = AwsSpot().steps(), Time()
    asked(steps)
    asked(steps, time.answer(200, b"first"))
    found(steps, time.answer(404))
    assert asked(steps, AGAIN).method == "GET"
    assert asked(steps, time.answer(401)).method == "PUT"
    assert asked(steps, time.answer(200, b"second")).headers == {"X-aws-ec2-metadata-token": "second"}
    look = found(steps, time.answer(401))
    assert isinstance(look.state, SourceError)
    assert "401" in look.state.what
    assert asked(steps, AGAIN).method == "PUT"


def test_P1_what_is_no_token_is_never_sent() -> None:
    for status, body in [(403, b""), (200, b""), (200, b"a\r\nX: y"), (200, b"\xff"), (404, b"token")]:
        steps = AwsSpot().steps()
        asked(steps)
        assert isinstance(found(steps, Time().answer(status, body)).state, SourceError)


def test_P1_silence_after_the_token_request_is_told_with_the_usual_reason() -> None:
    steps = AwsSpot().steps()
    asked(steps)
    look = found(steps, Unanswered("did not answer within 5 s", is_late=True))
    assert isinstance(look.state, SourceError)
    assert look.state.what.startswith(
        "http://169.254.169.254/latest/api/token did not answer within 5 s (in a container"
    )


def test_P2_the_first_look_is_answered_at_once_and_the_next_ones_wait_for_a_change() -> None:
    steps, time = Gcp(wait_seconds=10).steps(), Time()
    assert "wait_for_change" not in asked(steps).url
    assert found(steps, time.answer(200, b"FALSE", etag="e1")) == Look(Clear(), 0)
    request = asked(steps, AGAIN)
    assert request.url.endswith("/preempted?wait_for_change=true&timeout_sec=10&last_etag=e1")
    assert request.timeout > 10
    assert found(steps, time.answer(200, b"FALSE", seconds=10, etag="e1")) == Look(Clear(), 0)
    asked(steps, AGAIN)
    assert isinstance(found(steps, time.answer(200, b"TRUE", seconds=4, etag="e2")).state, Notice)


def test_P2_a_service_that_answers_at_once_though_asked_to_wait_is_asked_each_second() -> None:
    steps, time = Gcp().steps(), Time()
    asked(steps)
    found(steps, time.answer(200, b"FALSE", etag="e1"))
    for _ in range(3):
        assert "wait_for_change" in asked(steps, AGAIN).url
        assert found(steps, time.answer(200, b"FALSE", etag="e1")).seconds == 1


def test_P2_a_service_that_will_not_wait_is_asked_without_waiting_from_then_on() -> None:
    steps, time = Gcp().steps(), Time()
    asked(steps)
    found(steps, time.answer(200, b"FALSE", etag="e1"))
    assert "wait_for_change" in asked(steps, AGAIN).url
    assert "wait_for_change" not in asked(steps, time.answer(400)).url
    assert found(steps, time.answer(200, b"FALSE", etag="e1")) == Look(Clear(), 1)
    assert "wait_for_change" not in asked(steps, AGAIN).url


def test_P2_without_a_usable_etag_a_change_could_be_missed_so_nothing_waits() -> None:
    for etag in ("", "a&b=c", "a\r\nb"):
        steps, time = Gcp().steps(), Time()
        asked(steps)
        assert found(steps, time.answer(200, b"FALSE", etag=etag)).seconds == 1
        assert "wait_for_change" not in asked(steps, AGAIN).url


def test_P2_while_the_service_is_away_the_error_counts_and_the_next_look_is_answered_at_once() -> None:
    steps, time = Gcp().steps(), Time()
    asked(steps)
    found(steps, time.answer(200, b"FALSE", etag="e1"))
    asked(steps, AGAIN)
    assert isinstance(found(steps, time.answer(503, etag="e9")).state, SourceError)
    assert "wait_for_change" not in asked(steps, AGAIN).url


def test_P2_a_deadline_does_not_move_because_the_notice_is_read_again() -> None:
    steps, time = Gcp().steps(), Time()
    asked(steps)
    first = found(steps, time.answer(200, b"TRUE", etag="e1")).state
    asked(steps, AGAIN)
    assert found(steps, time.answer(200, b"TRUE", seconds=10, etag="e1")).state == first


def test_P3_the_first_look_has_two_minutes_and_the_next_ones_seconds() -> None:
    steps, time = Azure(vm_name="a").steps(), Time()
    assert asked(steps).timeout > 120
    found(steps, time.answer(200, b'{"Events": []}', seconds=119))
    assert asked(steps, AGAIN).timeout <= 10


def test_P3_the_name_of_the_vm_is_asked_for_once_or_not_at_all() -> None:
    steps, time = Azure().steps(), Time()
    assert "/compute/name?" in asked(steps).url
    assert "/scheduledevents?" in asked(steps, time.answer(200, b"a\n")).url
    found(steps, time.answer(200, b'{"Events": []}'))
    assert "/scheduledevents?" in asked(steps, AGAIN).url
    assert "/scheduledevents?" in asked(Azure(vm_name="a").steps()).url


def test_P3_without_a_name_nothing_is_known() -> None:
    for status, body in [(404, b"a"), (200, b""), (200, b"\x00")]:
        steps = Azure().steps()
        asked(steps)
        assert isinstance(found(steps, Time().answer(status, body)).state, SourceError)


# -- a file: real ones ------------------------------------------------------------------------------------------------


def test_a_file_is_read_a_moment_after_it_has_appeared(tmp_path: Path) -> None:
    path = tmp_path / "preempt"
    steps = File(str(path)).steps()
    assert next(steps) == Look(Clear(), 1)
    path.touch()  # as the shell does for `echo 30 > path`
    assert found(steps, AGAIN).state is None
    path.write_text("30\n")
    notice = found(steps, AGAIN).state
    assert isinstance(notice, Notice)
    assert notice.deadline is not None
    assert found(steps, AGAIN) == Look(notice, 1)
    path.unlink()
    assert found(steps, AGAIN).state == Clear()


def test_a_file_that_goes_before_it_is_read_was_none(tmp_path: Path) -> None:
    path = tmp_path / "preempt"
    path.touch()
    steps = File(str(path)).steps()
    assert next(steps) == Look(None, 0.1)
    path.unlink()
    assert found(steps, AGAIN).state == Clear()


def test_a_file_in_a_directory_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    steps = File(str(tmp_path / "no" / "preempt")).steps()
    look = next(steps)
    assert isinstance(look, Look)
    assert isinstance(look.state, SourceError)
    assert str(tmp_path / "no") in look.state.what
    (tmp_path / "no").mkdir()
    assert found(steps, AGAIN).state == Clear()


def test_a_path_below_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no").touch()
    look = next(File(str(tmp_path / "no" / "preempt")).steps())
    assert isinstance(look, Look)
    assert isinstance(look.state, SourceError)


def test_a_directory_and_a_pipe_are_notices_too_and_block_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        steps = File(str(path)).steps()
        next(steps)
        notice = found(steps, AGAIN).state
        assert isinstance(notice, Notice)
        assert notice.deadline is None
