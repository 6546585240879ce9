"""logs/README.md: a row for each event that the script can write, found in the script's source."""

import ast
import re

import train_gpt as t
from tests.support import SCRIPT

PAGE = SCRIPT.parent / "logs" / "README.md"


def rows() -> dict[str, str]:
    """What the page's table says of each event."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*) \|$", text, re.MULTILINE)
    return {name: said for names, said in found for name in re.findall(r"\w+", names)}


def takes_event(function: ast.FunctionDef) -> int | None:
    """Which of a call's arguments is the event, of a method less self; None if none is."""
    names = [argument.arg for argument in function.args.args if argument.arg != "self"]
    return names.index("event") if "event" in names else None


def events_written(source: str) -> dict[str, set[str]]:
    """The events that a script's log gets, and the fields that stand there by name.

    A call of what takes an `event` gives one: as it stands, or as made of its own function's event.
    The log itself is called by its variable's name. Raises AssertionError for any other event.
    """
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    places = {f.name: takes_event(f) for f in functions if takes_event(f) is not None}
    places["log"] = places.pop("__call__")
    given = []  # names of function and callee, the event, and fields
    for function in functions:
        for call in ast.walk(function):
            name = isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2]
            if name in places and len(call.args) > places[name]:
                fields = {keyword.arg for keyword in call.keywords if keyword.arg} - {"console"}
                given.append((function.name, name, call.args[places[name]], fields))
    events = {}
    passed_on = {}  # by the name of a function, what it was given
    for _, name, event, fields in given:
        if isinstance(event, ast.Constant):
            events.setdefault(event.value, set()).update(fields)
            passed_on.setdefault(name, set()).add(event.value)
    for function, _, event, _ in given:
        if isinstance(event, ast.JoinedStr):
            ending = ast.unparse(event).removeprefix("f'{event}").removesuffix("'")
            events |= {f"{begins}{ending}": set() for begins in passed_on[function]}
        else:
            own = isinstance(event, ast.Name) and event.id == "event"
            assert own or isinstance(event, ast.Constant), ast.unparse(event)
    return events


def test_every_event_that_the_script_writes_has_a_row_that_names_its_fields():
    events = events_written(SCRIPT.read_text(encoding="utf-8"))
    assert {"settings", "train", "error", "final_profile"} <= set(events)
    assert set(events) == set(rows())
    fields = [(event, field) for event, fields in events.items() for field in fields]
    assert [x for x in fields if f"`{x[1]}`" not in rows()[x[0]]] == []
    steps = set(t.Schedule._fields)
    assert {field for field in steps if f"`{field}`" not in rows()["train"]} == set()


def test_events_are_found_however_they_are_given():
    source = """
class Log:
    def __call__(self, line, event="", console="", **values): self.record(event, **values)
    def record(self, event, **values): pass
    def failed(self): self.record("error", error=1)
def report(log, event, **more): log.record(f"{event}_profile", nats=1)
def main(log, trainer):
    log("no record")
    trainer.log("text", "packed", size=1)
    report(log, "final", more=2)
"""
    found = {"error": {"error"}, "packed": {"size"}, "final": {"more"}, "final_profile": set()}
    assert events_written(source) == found
