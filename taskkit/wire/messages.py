"""Every message between two processes of the tree, as frozen structs.

Who sends what to whom is the union type at the end of each section; `codec` refuses anything else on that link.
Times are Unix seconds as float (wall clock, for display only), durations are seconds, sizes are bytes. JSON that
crosses as bytes is rendered once, by the process that made it, and passed on untouched.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct


class Message(Struct, frozen=True, kw_only=True, tag=True, tag_field="message", omit_defaults=True):
    """Base of all messages; the tag is the class name."""


# --- data carried by several messages ------------------------------------------------------------------------


class Row(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Address of a task row in the project's database: `model` is the model's class name, `pk` its JSON value."""

    app: str
    model: str
    pk: Any
    using: str = "default"

    @property
    def key(self) -> str:
        """The row's identity, the same for any letter case of the model's name."""
        return f"{self.app}.{self.model.lower()}:{self.pk}"


#: Options of a task and of a submission that bound a run's time besides `timeout`; see `taskkit.tasks.TaskOptions`.
LIMITS: Final = ("soft_timeout", "cpu_timeout", "stall_timeout", "schedule_timeout")

#: Longest `concurrency_key`, characters.
MAX_CONCURRENCY_KEY: Final = 200


class TaskInfo(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One task of the catalogue.

    Attributes:
      name: `<app label>.<function or model>`.
      path: dotted path, accepted as a name as well.
      kind: "function" or "model".
      parameters: JSON Schema (2020-12) of the keyword arguments, or of a model's `submit_fields`.
      positional: names of the parameters in their order, for submissions with `args`.
      concurrency, rate_limit: see `taskkit.tasks.TaskOptions`.
      on_lost: "retry" or "fail"; what happens when the machine fails under the run.
      on_disconnect: "continue" or "cancel".
    """

    name: str
    path: str
    kind: str
    doc: str = ""
    parameters: dict[str, Any] = {}
    positional: tuple[str, ...] = ()
    pool: str = "default"
    priority: int = 0
    timeout: float | None = None
    soft_timeout: float | None = None
    cpu_timeout: float | None = None
    stall_timeout: float | None = None
    schedule_timeout: float | None = None
    max_attempts: int = 1
    concurrency: int | None = None
    rate_limit: str | None = None
    memory_limit: int | None = None
    on_lost: str = "retry"
    on_disconnect: str = "continue"
    metadata: dict[str, Any] = {}


class TaskFailure(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An exception as data: class path, message, traceback text. Never a pickled object."""

    exception: str
    message: str = ""
    traceback: str = ""


class Cause(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a process died, as far as the supervisor can tell.

    Attributes:
      kind: "signal", "exit", "no_result" (exit code 0, but no result), "oom", "oom_suspected", "cpu_limit",
        "timeout", "soft_timeout", "cpu_timeout", "stall_timeout", "cancelled", "operator", "corrupt" (garbage on its
        events pipe), "descriptors" (its user code closed them), "boot" (it never came up), "stopped" (the tree
        stops), "lost" (the supervisor went away), "abandoned" (only attempts that had ended without it were left on
        it).
      signal: name such as "SIGSEGV", when a signal ended it.
      exit_code: when it left by itself.
      max_rss: bytes.
      cpu: seconds, user and system together.
      traceback: what faulthandler wrote at a fatal signal.
      detail: a sentence for people.
    """

    kind: str
    signal: str | None = None
    exit_code: int | None = None
    max_rss: int = 0
    cpu: float = 0.0
    traceback: str = ""
    detail: str = ""


class RunnerSpec(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a runner has to know before its first order.

    Attributes:
      id: name of the runner, unique for the life of the state directory.
      role: "runner" or "intake".
      pipe_size: granted bytes of its events pipe.
      event_limit: largest JSON of one event, bytes.
      result_limit: largest JSON of a result, bytes.
      cpu_limit: seconds of CPU before SIGXCPU, or None.
      nice: added to the priority.
    """

    id: str
    pool: str = "default"
    role: str = "runner"
    pipe_size: int = 65536
    concurrency: int = 1
    runs: int = 1
    loop: str = "asyncio"
    nice: int = 0
    memory_limit: int | None = None
    cpu_limit: int | None = None
    event_limit: int = 1024 * 1024
    result_limit: int = 8 * 1024 * 1024


class ScheduleDefinition(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a schedule is made of: see `taskkit.timetable`. `options` are what a submission may say besides."""

    task: str
    name: str = ""
    cron: str | None = None
    every: float | None = None
    at: float | None = None
    tz: str | None = None
    overlap: str = "skip"
    catchup: str = "latest"
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    options: dict[str, Any] = {}


class ScheduleState(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A schedule as the database has it; `origin` is "code" or "api", slots are Unix seconds."""

    id: str
    definition: ScheduleDefinition
    enabled: bool = True
    origin: str = "api"
    subject: str = ""
    next_slot: int | None = None
    last_slot: int | None = None
    created_at: float = 0.0
    error: str = ""


# --- gateway → runner (orders) -------------------------------------------------------------------------------


class Start(Message, frozen=True):
    """Perform one attempt. Sent again after a takeover: a runner ignores a `token` it has seen.

    `args`, `kwargs` and `metadata` are JSON as it is stored: the gateway does not take a megabyte apart. `after` is
    JSON: how the runs ended that this one comes after. `children`: how many it has had.
    """

    run: str
    attempt: int
    token: str
    task: str
    args: bytes = b"[]"
    kwargs: bytes = b"{}"
    row: Row | None = None
    max_attempts: int = 1
    metadata: bytes = b"{}"
    memory_limit: int | None = None
    after: bytes = b"[]"
    children: int = 0


class Cancel(Message, frozen=True):
    """Ask the attempt with this token to stop: cooperative; the supervisor holds the deadline."""

    token: str
    reason: str = "cancelled"


class Create(Message, frozen=True):
    """Validate and save a row of a model task (intake runners only); answered by `Created` with the same `ask`.

    `submission`, still without its row, goes to the outbox in the row's own transaction.
    """

    ask: str
    task: str
    fields: dict[str, Any]
    submission: Submit


class Input(Message, frozen=True):
    """Somebody tells the attempt with this token something, under a name; `data` is a JSON object.

    A run's inputs are numbered 1, 2, 3 … They are sent again after a takeover: a runner ignores a number that it has.
    """

    token: str
    number: int
    name: str
    data: bytes


class Retire(Message, frozen=True):
    """Finish what is open, then leave with exit code 0."""


class TakeBack(Message, frozen=True):
    """Give back the attempts with these tokens, if they have not begun; answered by `GivenBack` for each."""

    tokens: list[str]


Order = Start | Cancel | Input | Create | Retire | TakeBack


# --- runner → gateway (frames on the events pipe) -------------------------------------------------------------


class Hello(Message, frozen=True):
    """First frame of every runner."""

    runner: str
    pid: int


class Started(Message, frozen=True):
    """The attempt begins: user code has not run before this frame."""

    token: str


class Event(Message, frozen=True):
    """Something a task says. `data` is one line of JSON, or None when `blob` refers to it."""

    token: str
    type: str
    data: bytes = b""
    blob: str | None = None
    size: int = 0
    sha256: str = ""


class Progress(Message, frozen=True):
    """What the `progress()` helper says: an event named `run.progress` that may be dropped in the runner."""

    token: str
    data: bytes


class Finished(Message, frozen=True):
    """The attempt has ended by itself: "returned", "raised" or "cancelled".

    `result` is JSON, or None with `blob`. `retry_in` is what the task's `backoff` wants, in seconds. `seconds` is what
    the attempt took, where nothing else was performed meanwhile.
    """

    token: str
    ending: str
    result: bytes = b"null"
    blob: str | None = None
    size: int = 0
    sha256: str = ""
    failure: TaskFailure | None = None
    retry_in: float | None = None
    seconds: float | None = None


class Created(Message, frozen=True):
    """Answer to `Create`: the saved row, or messages by field, or a failure that is not the caller's.

    `run` is the id of the submission that the row was saved for: the one asked about, or an earlier one with its
    idempotency key. `using` is the alias of the database that has its outbox entry, `node` and `fence` whose it is.
    """

    ask: str
    row: Row | None = None
    run: str = ""
    using: str = "default"
    node: str = ""
    fence: str = ""
    errors: dict[str, str] = {}
    failure: TaskFailure | None = None


class GivenBack(Message, frozen=True):
    """The attempt will not begin here; nothing of it has happened."""

    token: str


RunnerMessage = Hello | Started | Event | Progress | Finished | Created | GivenBack

#: Kind byte of each message on the events pipe; for ever.
FRAME_KINDS: dict[type[Message], int] = {
    Hello: 1,
    Started: 2,
    Event: 3,
    Progress: 4,
    Finished: 5,
    Created: 6,
    GivenBack: 7,
}


# --- supervisor ↔ zygote --------------------------------------------------------------------------------------


class Fork(Message, frozen=True):
    """Fork these children, double. Descriptors of each child follow one another in the order of the specs:
    runner and intake: events, output, orders, faults, blobs; courier: control, poke, faults."""

    ask: int
    runners: list[RunnerSpec] = []
    courier: bool = False
    state_dir: str = ""


class Forked(Message, frozen=True):
    """One child lives; its pidfd comes along. Sent before the supervisor knows of it, so while nobody reaps it."""

    ask: int
    index: int
    pid: int


class ForkFailed(Message, frozen=True):
    """The fork did not come about (EAGAIN, ENOMEM …)."""

    ask: int
    detail: str


class ZygoteReady(Message, frozen=True):
    """Django and all tasks are imported and frozen.

    Attributes:
      settings: the project's TASKKIT dict with TASKKIT_* of the environment over it, as plain data.
      allowed_hosts: Django's ALLOWED_HOSTS, the default of ours.
      versions: of Python, Django and this package.
      unapplied: taskkit migrations that the database lacks, `<app>.<name>`; checked in a forked child.
      pending: those of other apps.
      database_error: why the check could not be made; the database may be away.
    """

    settings: dict[str, Any]
    settings_module: str
    catalogue: list[TaskInfo]
    allowed_hosts: list[str] = []
    debug: bool = False
    versions: dict[str, str] = {}
    unapplied: list[str] = []
    pending: list[str] = []
    database_error: str = ""


class ZygoteFailed(Message, frozen=True):
    """The project could not be imported, or does not survive a fork; `detail` is the traceback from the
    project's own first frame on, or empty where `reason` says everything."""

    reason: str
    detail: str


ZygoteMessage = Forked | ForkFailed | ZygoteReady | ZygoteFailed
ZygoteOrder = Fork | Retire


# --- supervisor ↔ gateway -------------------------------------------------------------------------------------


class Configure(Message, frozen=True):
    """First message to a gateway; the listening socket comes along.

    `boot_id` tells a reboot from a restart; `settings` is the resolved Settings struct as plain data. `adopting`
    names the runners whose RunnerUp follows; an open attempt of any other runner is lost. `tree_mark` is in the
    environment of whatever tasks start (taskkit.linux.TREE_MARK).
    """

    settings: dict[str, Any]
    catalogue: list[TaskInfo]
    state_dir: str
    url: str
    boot_id: str
    key_file: str
    allowed_hosts: list[str]
    tree_mark: str = ""
    versions: dict[str, str] = {}
    adopting: list[str] = []


class RunnerUp(Message, frozen=True):
    """A runner exists. Descriptors: events (read end), output (read end), orders.

    Sent again to a new gateway for every runner that is not drained, in front of its `Exited` if it has died.
    `adopted` is true then. One that is `retiring` gets no further run: it is of older code.
    """

    spec: RunnerSpec
    pid: int
    started_at: float
    adopted: bool = False
    retiring: bool = False


class Exited(Message, frozen=True):
    """A runner has died. Repeated to each new gateway until it says `Drained`."""

    runner: str
    cause: Cause


class Expired(Message, frozen=True):
    """A deadline has passed that the gateway acts on; said again and again, as a gateway may die over it.

    It is that of an attempt in a shared process, or of a kind in `TOLD`.
    """

    runner: str
    token: str
    kind: str


class Link(Message, frozen=True):
    """A fresh socket to the other side (courier or gateway) comes along; an older one is void."""


class Drain(Message, frozen=True):
    """Stop claiming and ask open attempts to stop; their runs go back to READY, uncounted.

    Attributes:
      grace: seconds until the supervisor takes the next step by itself.
    """

    grace: float


class Park(Message, frozen=True):
    """A planned restart: send every stream away with `retry:`, let go of the store, leave. The pipes stay as they are
    for the next gateway."""


class Reconfigure(Message, frozen=True):
    """The project's code has changed: this is its catalogue now, and the runners in `retire` get no further run.

    Answered by `Reconfigured` with the same `ask` when no run can be given to them any more.
    """

    ask: int
    catalogue: list[TaskInfo]
    versions: dict[str, str] = {}
    retire: list[str] = []


class EndStreams(Message, frozen=True):
    """Every runner has ended and been drained: end the streams, commit, close, leave."""


class GatewayReady(Message, frozen=True):
    """The gateway serves."""


class Drained(Message, frozen=True):
    """All of this runner's frames are committed and consumed: its descriptors may go."""

    runner: str


#: Kinds of deadlines at which the gateway has something to do: ask the attempt to stop; see when it last spoke.
TOLD: Final = frozenset({"soft_timeout", "silence"})


class Deadline(Message, frozen=True):
    """End the runner in `after` seconds unless `Disarm` comes first: TERM, then KILL `grace` seconds later.

    `kind` is the cause to report: "timeout", "stall_timeout", "cancelled", or "abandoned" (nothing but attempts that
    were ended without it are left on it; `token` is empty then). That of "cpu_timeout" passes after so many seconds
    of CPU. One deadline per token and kind; a later one with the same key replaces it. An attempt in a shared process
    is not worth its neighbours: `Expired` is said instead, every `grace` seconds until `Disarm`; so it is when a
    deadline of a kind in `TOLD` passes, for which no process is ended.
    """

    runner: str
    token: str
    kind: str
    after: float
    grace: float
    #: an earlier one with the same key stands: for a gateway that does not know whether its predecessor has said it
    at_most: bool = False


class Disarm(Message, frozen=True):
    """The attempt has ended: forget its deadlines."""

    runner: str
    token: str


class Kill(Message, frozen=True):
    """End the runner now; `kind` is the cause to report ("corrupt", "operator", "timeout")."""

    runner: str
    kind: str
    detail: str = ""


class Greeted(Message, frozen=True):
    """The runner has said `Hello`: it has imported what it needs and waits for orders."""

    runner: str


class Assigned(Message, frozen=True):
    """The runner got a run; with `last` it gets no other, so that a replacement may be forked."""

    runner: str
    last: bool


class Reconfigured(Message, frozen=True):
    """Answer to `Reconfigure`."""

    ask: int


class Stalled(Message, frozen=True):
    """The store does not take what runners say, so their pipes fill and they wait: deadlines stand still.

    `error` says why; empty when the store takes it again.
    """

    error: str


class Notes(Message, frozen=True):
    """What the operator has to know of the runs, in sentences for `status`; said again when it changes."""

    notes: list[str]


class Stopped(Message, frozen=True):
    """Answer to `EndStreams` and `Park`: everything is committed, every stream has ended."""


class Beat(Message, frozen=True):
    """The sender's loop turns."""


GatewayOrder = Configure | RunnerUp | Exited | Expired | Link | Drain | Park | Reconfigure | EndStreams
GatewayMessage = (
    GatewayReady
    | Drained
    | Deadline
    | Disarm
    | Kill
    | Greeted
    | Assigned
    | Reconfigured
    | Stalled
    | Notes
    | Stopped
    | Beat
)


# --- supervisor ↔ courier -------------------------------------------------------------------------------------


class Stop(Message, frozen=True):
    """Finish the message at hand and leave."""


class CourierReady(Message, frozen=True):
    """The courier turns; `node` is its row in the project's database, when that could be written."""

    node: str = ""


CourierOrder = Link | Stop
CourierMessage = CourierReady | Beat


# --- courier ↔ gateway ----------------------------------------------------------------------------------------


class Taken(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What Django knew of a run when it was taken from a node that is dead, so that another can go on with it.

    Attributes:
      node: whom it was taken from.
      moves: how often it was taken, this time included.
      version, attempt: of its newest transition that Django has.
      counted: attempts that count against `max_attempts`; crashes: runners that it has killed.
      began: whether an attempt had begun that has not ended; runner: on which one.
    """

    node: str
    moves: int
    version: int = 0
    attempt: int = 0
    counted: int = 0
    crashes: int = 0
    began: bool = False
    runner: str = ""
    created_at: float = 0.0
    started_at: float | None = None


class Submit(Message, frozen=True):
    """A row of the outbox wants to become the run `id`. Idempotent: the same id again gives the same answer.

    `key` is the idempotency key of a submission over HTTP, `digest` that of the body that came with it. `fence` is what
    Django has noted of this node's claim, if anything, and `node` its name where it is still to be noted; `taken`: the
    run was another node's.
    """

    id: str
    task: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    row: Row | None = None
    pool: str | None = None
    priority: int | None = None
    run_after: float | None = None
    timeout: float | None = None
    soft_timeout: float | None = None
    cpu_timeout: float | None = None
    stall_timeout: float | None = None
    schedule_timeout: float | None = None
    max_attempts: int | None = None
    metadata: dict[str, Any] = {}
    tags: list[str] = []
    concurrency_key: str = ""
    parent: str | None = None
    after: list[str] = []
    subject: str = ""
    using: str = "default"
    key: str | None = None
    digest: bytes = b""
    fence: str = ""
    node: str = ""
    taken: Taken | None = None


class Submitted(Message, frozen=True):
    """Answer to `Submit`: committed as run `run` (another id when the row was already running), or refused.

    `fence`: of the copy that there is here, else of the submission.
    """

    id: str
    run: str = ""
    error: str = ""
    code: str = ""
    fence: str = ""


class Transition(Message, frozen=True):
    """The run as it stands since `version`; the courier writes it to the project's database `using`.

    `args`, `kwargs`, `metadata`, `result`, `error` and `failure` are JSON as it is stored: the courier parses it, not
    the loop that serves streams. `runner`, `attempted_at`, `failure`: of the newest attempt. `fence` is that of this
    node's copy of the run; where Django has another, this is void. `options`: JSON of what else the submission said,
    of one that Django has not made.
    """

    run: str
    version: int
    task: str
    status: str
    attempt: int = 0
    runner: str = ""
    attempted_at: float | None = None
    failure: bytes | None = None
    priority: int = 0
    args: bytes = b"[]"
    kwargs: bytes = b"{}"
    row: Row | None = None
    created_at: float = 0.0
    started_at: float | None = None
    finished_at: float | None = None
    result: bytes | None = None
    error: bytes | None = None
    metadata: bytes = b"{}"
    tags: list[str] = []
    using: str = "default"
    fence: str = ""
    options: bytes = b"{}"


class Told(Message, frozen=True):
    """Answer to `Transition`: the database has version `version` or a newer one."""

    run: str
    version: int


class Ask(Message, frozen=True):
    """What does the database say about this row? `model` in any letter case; `app` may be empty."""

    ask: str
    app: str
    model: str
    pk: str


class Answer(Message, frozen=True):
    """Answer to `Ask`.

    `status`: "found", "unknown" (no such row or no such task model), "bad_pk" (the field cannot parse it),
    "ambiguous" (several apps have such a model), "away" (the database does not answer).
    `final_value` is JSON.
    """

    ask: str
    status: str
    task: str = ""
    row: Row | None = None
    completed_at: str | None = None
    final_value: bytes = b"null"
    detail: str = ""


class Recall(Message, frozen=True):
    """Django holds these runs to be open, in these versions. Answered, per run, by `Forgotten`, or a `Transition`
    if the store has a newer version that is not told anyway, or not at all."""

    runs: dict[str, int]


class Forgotten(Message, frozen=True):
    """The store does not know this run."""

    run: str


class Company(Message, frozen=True):
    """Whether other nodes live that share a database with this one: then a run may be at another's."""

    shared: bool


class Disown(Message, frozen=True):
    """Another node has this run now: the copy with this fence counts no more. Answered by `Disowned`."""

    run: str
    fence: str


class Disowned(Message, frozen=True):
    """There is no such copy here (any more)."""

    run: str
    fence: str


class Locate(Message, frozen=True):
    """Which node has this run? Answered by `Located` with the same `ask`."""

    ask: str
    run: str


class Located(Message, frozen=True):
    """Answer to `Locate`.

    `status`: "found" (with the URL of a node that lives, the run's task and whose it is), "unknown" (no node that could
    be named has it), "away" (the database does not answer).
    """

    ask: str
    status: str
    url: str = ""
    task: str = ""
    subject: str = ""
    detail: str = ""


class ScheduleOrder(Message, frozen=True):
    """What is to be done with schedules: "list", "create", "show", "enable", "disable", "delete". Answered by
    `ScheduleAnswer` with the same `ask`.

    `id` is of the one that is meant; "list" begins behind the name `after`, and has at most `limit`.
    """

    ask: str
    order: str
    id: str = ""
    definition: ScheduleDefinition | None = None
    enabled: bool = True
    subject: str = ""
    after: str = ""
    limit: int = 50


class ScheduleAnswer(Message, frozen=True):
    """Answer to `ScheduleOrder`.

    `status`: "done", "made" (it is new), "unknown" (there is none), "taken" (another has the name, or it is the
    code's), "invalid" (`errors` has a sentence per field), "away" (the database does not answer). `more`: the list goes
    on behind the last one.
    """

    ask: str
    status: str
    schedules: list[ScheduleState] = []
    more: bool = False
    detail: str = ""
    errors: dict[str, str] = {}


CourierToGateway = Submit | Told | Answer | Recall | ScheduleAnswer | Company | Disown | Located
GatewayToCourier = Submitted | Transition | Ask | Forgotten | ScheduleOrder | Disowned | Locate


# --- operator socket ------------------------------------------------------------------------------------------


class Operation(Message, frozen=True):
    """What the command line asks of a running supervisor: "status", "stop", "reload", "restart-gateway", "upgrade"
    (no answer when it succeeds), "upgraded" (answered when what follows an upgrade is done)."""

    name: str
    now: bool = False


class ChildStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One process of the tree as the supervisor sees it."""

    name: str
    kind: str
    state: str
    pid: int = 0
    restarts: int = 0
    age: float = 0.0
    last: str = ""


class Status(Message, frozen=True):
    """Answer to every operation; `error` says why it was not carried out."""

    pid: int
    state: str
    url: str
    state_dir: str
    settings_module: str
    uptime: float
    children: list[ChildStatus] = []
    versions: dict[str, str] = {}
    notes: list[str] = []
    error: str = ""


OperatorMessage = Operation | Status
