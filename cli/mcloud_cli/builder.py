"""What the commands of all resources share: naming things, listing, showing, deleting, changing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from mcloud_cli import follow, output
from mcloud_cli.kinds import Kind
from mcloud_cli.output import Column

if TYPE_CHECKING:
    from mcloud_cli.session import Session

ID = Column("ID", lambda item: str(item.metadata.id))
NAME = Column("NAME", lambda item: str(item.metadata.name))
AGE = Column("AGE", lambda item: output.age(item.metadata.create_time))


def group(
    name: str, sentence: str, *, example: str, parent: click.Group | None = None
) -> click.Group:
    """Make a group of commands, within another if one is given."""
    made = click.Group(name, help=_help(sentence, example))
    if parent is not None:
        parent.add_command(made)
    return made


class Named(click.ParamType[str]):
    """The name or id of a resource; a shell can complete it."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.name = kind.noun

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Return the names that begin so; nothing if the cloud does not answer soon."""
        from mcloud_cli import completion

        return [CompletionItem(name) for name in completion.names(ctx, self.kind, incomplete)]


def named(kind: Kind, metavar: str = "", *, many: bool = False) -> Callable[[Any], Any]:
    """Give a command an argument that names a resource of a kind."""
    word = kind.noun.replace(" ", "_")
    return click.argument(
        f"{word}s" if many else word,
        type=Named(kind),
        metavar=metavar or word.upper() + ("..." if many else ""),
        nargs=-1 if many else 1,
        required=True,
    )


def labels(function: Any) -> Any:
    """Give a command `--label`."""
    return click.option(
        "--label", "labels", multiple=True, callback=pairs, help="KEY=VALUE; may be repeated."
    )(function)


def pairs(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    """Read a repeated KEY=VALUE."""
    found = {}
    for item in value:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{item!r} is not KEY=VALUE", ctx, param)
        found[key] = text
    return found


def add_list(
    group: click.Group,
    kind: Kind,
    columns: Sequence[Column],
    *,
    long: Sequence[Column] = (),
    example: str = "",
    all_projects: bool = True,
    title: Column = NAME,
    age: bool = True,
) -> None:
    """Add `list` to a group.

    Args:
        columns: between name and age.
        long: further ones, after the id, with --long.
        all_projects: the resources belong to projects.
    """

    @group.command("list", help=_help(f"List {kind.noun}s.", example or f"{group.name} list"))
    @click.option("--filter", "condition", default="", help='Such as name="x" AND labels.k="v".')
    @click.option("--order-by", default="", help='"create_time" or "name", with " desc" or not.')
    @click.option("--limit", default=0, help="At most so many. [default: all]")
    @click.option("--long", "is_long", is_flag=True, help="With ids and more.")
    @output.option
    @click.pass_obj
    def list_(
        session: Session,
        condition: str,
        order_by: str,
        limit: int,
        is_long: bool,
        form: str,
        everywhere: bool = False,
    ) -> None:
        fields = {"filter": condition, "order_by": order_by}
        if everywhere:
            fields["all_projects"] = True  # type: ignore[assignment]
        items = session.list(kind, limit=limit, **fields)
        last = (AGE,) if age else ()
        shown = (ID, title, *columns, *long, *last) if is_long else (title, *columns, *last)
        output.resources(items, form, shown)

    if all_projects:
        add_all_projects(list_)


def add_all_projects(command: click.Command) -> None:
    """Give a list command `--all-projects`."""
    text = "Of every project; needs a role on the system."
    option = click.Option(["--all-projects", "everywhere"], is_flag=True, help=text)
    command.params.append(option)


def add_show(group: click.Group, kind: Kind, *, example: str) -> None:
    """Add `show` to a group."""

    @group.command("show", help=_help(f"Show {_a(kind.noun)}.", f"{group.name} show {example}"))
    @named(kind)
    @output.option
    @click.pass_obj
    def show(session: Session, /, form: str, **names: str) -> None:
        (name,) = names.values()
        output.resource(session.get(kind, name), form)


def add_delete(
    group: click.Group, kind: Kind, *, example: str, find: Callable[..., Any] | None = None
) -> None:
    """Add `delete` to a group.

    Args:
        find: (session, text) -> resource, where names are not all there is.
    """

    @group.command("delete", help=_help(f"Delete {kind.noun}s.", f"{group.name} delete {example}"))
    @named(kind, many=True)
    @follow.option
    @output.option
    @click.pass_obj
    def delete(session: Session, /, wait: bool | None, form: str, **names: Sequence[str]) -> None:
        for name in next(iter(names.values())):
            found = find(session, name) if find else session.get(kind, name)
            operation = session.call(
                kind.rpc("Delete"), id=found.metadata.id, as_system=kind.is_of_system(found)
            )
            operation = follow.finish(session, operation, wait, form)
            said(operation, f"Deleted {kind.noun} {name}", form)


def create(
    session: Session,
    kind: Kind,
    form: str,
    *,
    wait: bool | None = None,
    as_system: bool = False,
    **fields: Any,
) -> None:
    """Make a resource and print it."""
    operation = session.call(kind.rpc("Create"), as_system=as_system, **fields)
    shown(session, kind, follow.finish(session, operation, wait, form), form)


def update(
    session: Session,
    kind: Kind,
    name: str,
    form: str,
    changes: Mapping[str, Any],
    *,
    as_system: bool = False,
) -> None:
    """Change what is given of a resource and print it.

    Args:
        changes: by path as in update_mask: "name", "spec.description"; None and {} are left alone.
    """
    given = {path: value for path, value in changes.items() if value is not None and value != {}}
    if not given:
        raise click.UsageError("say what to change; see --help")
    spec = {p.removeprefix("spec."): v for p, v in given.items() if p.startswith("spec.")}
    plain = {path: value for path, value in given.items() if not path.startswith("spec.")}
    found = session.get(kind, name)
    operation = session.call(
        kind.rpc("Update"),
        id=found.metadata.id,
        update_mask={"paths": list(given)},
        spec=spec,
        as_system=as_system or kind.is_of_system(found),
        **plain,
    )
    shown(session, kind, follow.finish(session, operation, None, form), form)


def shown(session: Session, kind: Kind, operation: Any, form: str) -> None:
    """Print what an operation has made; of one that goes on, what is known."""
    from mcloud_cli import contract

    if form in ("name", "id"):
        click.echo(operation.resource.id if form == "id" else operation.resource.name)
        return
    if not follow.is_ended(operation):
        if form != "table":
            output.data(output.as_dict(operation), form)
        return
    made = contract.unpack(operation.response)
    if made is None or made.DESCRIPTOR.name != kind.message:
        made = session.call(kind.rpc("Get"), id=operation.resource.id)
    output.resource(made, form)


def said(operation: Any, sentence: str, form: str) -> None:
    """Say what an operation did, to people; programs get the operation."""
    if form in ("name", "id"):
        click.echo(operation.resource.id if form == "id" else operation.resource.name)
    elif form != "table":
        output.data(output.as_dict(operation), form)
    elif follow.is_ended(operation):
        click.echo(sentence)


def _help(sentence: str, example: str) -> str:
    return f"{sentence}\n\nExample: mcloud {example}"


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
