"""The control socket: the client against the server over a real device, and bare varlink."""

import dataclasses
import json
import os
import socket
import stat
import tempfile
import threading
from pathlib import Path

import pytest
from asyncvarlink import FileDescriptor

import zramd
from zramd import attributes, errors
from zramd.control.client import Control
from zramd.control.server import ControlThread
from zramd.device import Zram
from zramd.errors import (
    KINDS,
    BadValue,
    DeviceBusy,
    NoServer,
    NotInitialised,
    NotSupported,
    SaveFailed,
    ServerFailed,
    ZramdError,
)


@pytest.fixture
def place():
    with tempfile.TemporaryDirectory(prefix="z") as directory:
        (Path(directory) / "zram0").mkdir()
        yield Path(directory) / "zram0" / "control"


@pytest.fixture
def zram():
    zram = Zram("zram0")
    yield zram
    zram.close()


@pytest.fixture
def stopped():
    return threading.Event()


@pytest.fixture
def thread(zram, place, stopped):
    thread = ControlThread(zram, place, stopped.set)
    thread.start()
    yield thread
    thread.close()


@pytest.fixture
def control(thread, place):
    with Control(place) as control:
        yield control


def varlink(place, method, **parameters):
    """One call by hand: what comes back, as JSON."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(place))
        sock.sendall(json.dumps({"method": method, "parameters": parameters}).encode() + b"\0")
        answer = b""
        while not answer.endswith(b"\0"):
            answer += sock.recv(65536)
        return json.loads(answer[:-1])


def test_attributes_are_read_and_written(control, zram):
    control.set("disksize", "1M")
    assert control.get("disksize") == "1048576"
    assert zram.disksize == 1 << 20


def test_statistics_come_back_as_they_were_taken(control, zram):
    zram.init(1 << 20)
    opener = zram.open("a test")
    opener.write(0, os.urandom(8192) + bytes(4096))
    assert control.statistics() == zram.statistics()
    assert control.statistics().openers == ("a test",)
    opener.close()


def test_a_reset_drops_everything(control, zram):
    zram.init(1 << 20)
    control.reset()
    assert zram.disksize == 0


def test_a_reset_of_an_open_device_is_refused_naming_who_holds_it_unless_forced(control, zram):
    zram.init(1 << 20)
    opener = zram.open("somebody in particular")
    with pytest.raises(DeviceBusy, match="somebody in particular"):
        control.reset()
    assert zram.disksize == 1 << 20
    control.reset(force=True)
    assert zram.disksize == 0
    opener.close()


def test_stop_is_refused_while_the_device_is_open_and_then_nothing_ends(control, zram, stopped):
    zram.init(1 << 20)
    opener = zram.open("somebody in particular")
    with pytest.raises(DeviceBusy, match="somebody in particular"):
        control.stop()
    assert not stopped.is_set()
    assert zram.disksize == 1 << 20
    control.stop(force=True)
    assert stopped.is_set()
    opener.close()


def test_after_stop_nobody_can_open_the_device_any_more(control, zram, stopped):
    zram.init(1 << 20)
    control.stop()
    assert stopped.is_set()
    with pytest.raises(NotInitialised):
        zram.open("too late")


def test_what_cannot_be_upgraded_says_so_and_serves_on(control, zram):
    assert control.version() == zramd.__version__
    with pytest.raises(NotSupported, match="the server of zram0 cannot be upgraded in use"):
        control.upgrade(["/bin/true"])
    assert control.statistics() == zram.statistics()


def test_the_reply_to_stop_arrives_though_the_server_ends_at_once(zram, place):
    for _ in range(20):
        told = threading.Event()
        thread = ControlThread(zram, place, told.set)
        thread.start()
        closer = threading.Thread(target=lambda t=thread, e=told: (e.wait(30), t.close()))
        closer.start()
        with Control(place) as control:
            control.stop()
        closer.join()
        assert not place.exists()


@pytest.mark.parametrize(
    ("error", "attribute", "value"),
    [(BadValue, "nonsense", "1"), (NotSupported, "algorithm_params", "dict=x")],
)
def test_an_error_of_the_device_is_raised_here_as_it_was_there(
    control, zram, error, attribute, value
):
    zram.init(1 << 20)
    with pytest.raises(error) as there:
        attributes.set(zram, attribute, value)
    with pytest.raises(error) as here:
        control.set(attribute, value)
    assert (here.value.message, here.value.hint) == (there.value.message, there.value.hint)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.slug)
def test_every_class_of_error_survives_the_way(control, zram, monkeypatch, kind):
    def fail(zram, attribute):
        raise kind("it happened", hint="do this")

    monkeypatch.setattr(attributes, "get", fail)
    with pytest.raises(kind) as caught:
        control.get("anything")
    assert type(caught.value) is kind
    assert (caught.value.message, caught.value.hint) == ("it happened", "do this")


def test_something_unforeseen_in_the_server_is_an_error_and_it_goes_on(
    control, zram, monkeypatch, caplog
):
    def fail(zram, attribute):
        raise RuntimeError("a bug")

    monkeypatch.setattr(attributes, "get", fail)
    with pytest.raises(ZramdError, match="RuntimeError: a bug") as caught:
        control.get("anything")
    assert type(caught.value) is ZramdError
    assert control.statistics().name == "zram0"
    assert "a bug" in caplog.text


def test_slow_calls_do_not_keep_those_waiting_who_only_look(thread, zram, place, monkeypatch):
    entered, leave = threading.Semaphore(0), threading.Event()

    def slow(zram, attribute, value):
        entered.release()
        assert leave.wait(30)
        done.append(value)

    def change(value):
        with Control(place) as control:
            control.set("anything", value)

    monkeypatch.setattr(attributes, "set", slow)
    done = []
    # As many as there can be threads: who only looks is answered all the same.
    workers = min(32, (os.cpu_count() or 1) + 4)
    changes = [threading.Thread(target=change, args=(str(n),)) for n in range(workers + 2)]
    for thread in changes:
        thread.start()
    for _ in range(workers):
        assert entered.acquire(timeout=30)
    with Control(place) as other:
        assert other.statistics().name == "zram0"
        assert other.get("disksize") == "0"
    assert done == []
    leave.set()
    for thread in changes:
        thread.join()
    assert sorted(done, key=int) == [str(n) for n in range(workers + 2)]


def test_a_reset_that_waits_tells_for_whom(thread, control, zram, monkeypatch):
    monkeypatch.setattr("zramd.control.client.PATIENCE_S", 0.01)
    zram.init(1 << 20)
    opener = zram.open("a client of ours")
    record = zram._gate.enter(opener.who)
    told = []

    def leave(in_flight):
        told.append(in_flight)
        record.inside = None
        record.meeting.set()

    control.reset(force=True, waiting=leave)
    assert told == [("a client of ours",)]
    assert zram.disksize == 0
    told.clear()
    monkeypatch.setattr("zramd.control.client.PATIENCE_S", 30)
    control.reset(force=True, waiting=leave)
    assert told == []


def test_a_reset_goes_on_if_nobody_can_tell_for_whom_it_waits(thread, control, zram, monkeypatch):
    monkeypatch.setattr("zramd.control.client.PATIENCE_S", 0.01)
    zram.init(1 << 20)
    record = zram._gate.enter("us")

    def fail():
        record.inside = None
        record.meeting.set()
        raise BadValue("cannot tell")

    monkeypatch.setattr(zram, "statistics", fail)
    control.reset(force=True, waiting=pytest.fail)
    assert zram.disksize == 0


def test_many_clients_at_once_are_all_served(thread, place):
    def ask():
        with Control(place) as control:
            answers.append(control.get("disksize"))

    answers = []
    clients = [threading.Thread(target=ask) for _ in range(40)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert answers == ["0"] * 40


def test_where_nobody_listens_there_is_no_server(place):
    with pytest.raises(NoServer, match="zram0") as caught:
        Control(place)
    assert "zramd up" in caught.value.hint


def test_a_socket_whose_server_died_is_no_server_either(place):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    with pytest.raises(NoServer):
        Control(place)


def test_a_stale_socket_is_replaced(place, zram, stopped):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place))
    thread = ControlThread(zram, place, stopped.set)
    thread.start()
    with Control(place) as control:
        assert control.get("disksize") == "0"
    thread.close()


def test_a_socket_that_cannot_be_made_is_told_and_no_thread_stays(zram, stopped, place):
    thread = ControlThread(zram, place / "not" / "there", stopped.set)
    with pytest.raises(ServerFailed, match="No such file"):
        thread.start()
    assert not [t for t in threading.enumerate() if t.name == "control"]


def test_a_server_that_never_answers_is_told_instead_of_waited_for(place, monkeypatch):
    monkeypatch.setattr("zramd.control.client.ANSWER_S", 0.05)
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(str(place))
        mute.listen()
        with Control(place) as control, pytest.raises(ServerFailed, match="does not answer"):
            control.statistics()


def test_a_server_that_ends_while_it_is_asked_is_told(place):
    with socket.socket(socket.AF_UNIX) as dying:
        dying.bind(str(place))
        dying.listen()
        with Control(place) as control:
            dying.accept()[0].close()
            with pytest.raises(ServerFailed, match="ended while it was being asked"):
                control.statistics()


def test_a_server_of_another_version_is_told(place):
    def answer():
        connection, _ = speaker.accept()
        connection.recv(4096)
        connection.sendall(b'{"parameters": {"name": "zram0", "colour": "blue"}}\0')
        connection.close()

    with socket.socket(socket.AF_UNIX) as speaker:
        speaker.bind(str(place))
        speaker.listen()
        thread = threading.Thread(target=answer)
        thread.start()
        with Control(place) as control, pytest.raises(ServerFailed, match="another version"):
            control.statistics()
        thread.join()


def test_the_socket_is_ours_alone_and_goes_with_the_server(thread, place):
    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    thread.close()
    thread.close()
    assert not place.exists()


def test_any_varlink_client_can_ask_what_the_service_is(thread, place):
    info = varlink(place, "org.varlink.service.GetInfo")["parameters"]
    assert info["product"] == "zramd"
    assert info["interfaces"] == ["org.varlink.service", "zramd.Device"]


def test_the_description_names_every_method_every_figure_and_the_error(thread, place, zram):
    reply = varlink(place, "org.varlink.service.GetInterfaceDescription", interface="zramd.Device")
    said = reply["parameters"]["description"]
    assert "interface zramd.Device" in said
    for method in ("Get", "Set", "Statistics", "Reset", "Stop"):
        assert f"\nmethod {method}(" in said
    for field in dataclasses.fields(zram.statistics()):
        assert f"{field.name}: " in said
    assert "\nerror Failed (slug: string, message: string, hint: ?string)" in said


def test_any_varlink_client_can_call_and_leave_out_force(thread, place, zram):
    zram.init(1 << 20)
    reply = varlink(place, "zramd.Device.Statistics")
    assert reply["parameters"]["disksize"] == 1 << 20
    assert "error" not in varlink(place, "zramd.Device.Reset")
    assert zram.disksize == 0


def test_an_error_on_the_wire_has_its_slug(thread, place):
    reply = varlink(place, "zramd.Device.Get", attribute="nonsense")
    assert reply["error"] == "zramd.Device.Failed"
    assert reply["parameters"]["slug"] == errors.BadValue.slug


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("zramd.Device.Fly", {}, "MethodNotFound"),
        ("io.github.zramd.Nothing.Get", {}, "InterfaceNotFound"),
        ("zramd.Device.Get", {"attribute": 3}, "InvalidParameter"),
    ],
)
def test_wrong_calls_get_the_standard_s_errors(thread, place, method, parameters, error):
    assert varlink(place, method, **parameters)["error"] == f"org.varlink.service.{error}"


def test_rubbish_on_the_socket_hurts_nobody(thread, place):
    for rubbish in (b"\0", b"{\0", b"[]\0", b'{"method": 3}\0', b"\xff\xfe\0", b"x" * 100_000):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(place))
            sock.sendall(rubbish)
    with Control(place) as control:
        assert control.get("disksize") == "0"


def test_a_stop_that_cannot_seal_the_file_says_so_and_stops_all_the_same(
    control, zram, stopped, monkeypatch
):
    def fail(*, force: bool) -> None:
        raise SaveFailed("the arena's file cannot be sealed")

    with monkeypatch.context() as patch:
        patch.setattr(zram, "close", fail)
        with pytest.raises(SaveFailed, match="cannot be sealed"):
            control.stop()
    assert stopped.wait(10)


def test_a_save_ends_with_who_wanted_it(control, zram):
    zram.init(1 << 20)
    while_open, kept_open = os.pipe()
    os.close(kept_open)
    file = os.memfd_create("snapshot")
    ends = FileDescriptor(file), FileDescriptor(while_open)
    with pytest.raises(SaveFailed, match="who wanted the snapshot has gone"):
        control._call(control._device.Save(file=ends[0], while_open=ends[1]))
    control.save(file)
    os.close(while_open)
    os.close(file)


@pytest.mark.parametrize(
    "said",
    [b"\xff\0", b"[" * 50_000 + b"\0", b"x" * (1 << 20)],
    ids=["no UTF-8", "nested without end", "without end"],
)
def test_what_is_no_message_ends_the_connection_and_no_other(place, thread, said, caplog):
    with Control(place) as control, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(place))
        try:
            client.sendall(said)
            assert client.recv(1) == b""
        except ConnectionError:
            pass  # it has ended before it took all
        assert control.get("initstate") == "0"
    assert not caplog.records
