"""mcloud: the command line. Starts fast: a command's module is imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

import click

# Command -> (module, its attribute, one line of help). What stands here is all that `mcloud --help`
# needs; the order is that of the help.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "login": ("login", "login", "Log in to a cloud and remember it."),
    "logout": ("login", "logout", "Forget a cloud's tokens."),
    "boot": ("instance_create", "boot", "Build an instance and follow its sixteen steps."),
    "list": ("instance", "list_instances", "List instances."),
    "show": ("instance", "show_instance", "Show an instance."),
    "delete": ("instance", "delete_instance", "Delete instances."),
    "capacity": ("instance", "capacity", "Tell how many more instances of a flavor fit."),
    "instance": ("instance", "group", "Virtual machines."),
    "flavor": ("flavor", "group", "Sizes of instances."),
    "keypair": ("keypair", "group", "SSH keys that instances let in."),
    "server-group": ("server_group", "group", "Instances to be kept together, or apart."),
    "image": ("image", "group", "Disk images."),
    "network": ("network", "group", "Networks."),
    "subnet": ("subnet", "group", "Address ranges of networks."),
    "port": ("port", "group", "Connections of instances to networks."),
    "router": ("router", "group", "Routers between networks."),
    "security-group": ("security_group", "group", "What traffic reaches instances."),
    "floating-ip": ("floating_ip", "group", "Addresses of the outside world."),
    "volume": ("volume", "group", "Disks that outlive instances."),
    "operation": ("operation", "group", "What is being done, and how it went."),
    "host": ("host", "group", "Hypervisors."),
    "domain": ("domain", "group", "What hosts run for instances."),
    "join-token": ("join_token", "group", "Tokens with which machines become hosts."),
    "project": ("project", "group", "Projects."),
    "user": ("user", "group", "Users."),
    "role": ("role", "group", "Who may do what, where."),
    "application-credential": ("application_credential", "group", "Credentials of programs."),
    "quota": ("quota", "group", "What a project may have at once."),
    "endpoint": ("login", "endpoint", "Where the services are."),
    "token": ("login", "token", "The token in use."),
    "admin": ("admin", "group", "Care for the whole cloud."),
    "completion": ("completion", "completion", "Print a shell's completion script."),
}


class Root(click.Group):
    """The commands, imported one by one; and the end of every error."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"mcloud_cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; say its error in one line, with the way out."""
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except Exception as error:  # the outermost loop: what is not an error of mcloud goes on
            from mcloud_cli import failure

            failure.report(error, ctx.obj)
            raise


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--cloud", envvar="MCLOUD_CLOUD", help="Which of the clouds logged in to.")
@click.option("--endpoint", envvar="MCLOUD_ENDPOINT", help="host:port of the cloud.")
@click.option("--ca", envvar="MCLOUD_CA", help="File: the authority of its certificate.")
@click.option("--username", envvar="MCLOUD_USERNAME", help="Who you are.")
@click.option("--project", envvar="MCLOUD_PROJECT", help="Name or id of the project to work in.")
@click.option("--system", is_flag=True, help="Use the role on the whole system.")
@click.version_option(package_name="mcloud", prog_name="mcloud")
@click.pass_context
def main(
    ctx: click.Context,
    cloud: str | None,
    endpoint: str | None,
    ca: str | None,
    username: str | None,
    project: str | None,
    system: bool,
) -> None:
    """Virtual machines, networks, disks and images of an mcloud cloud.

    Things are named by name or id. Passwords and secrets come from the environment:
    MCLOUD_PASSWORD, MCLOUD_TOKEN, or MCLOUD_APPLICATION_CREDENTIAL_ID with
    MCLOUD_APPLICATION_CREDENTIAL_SECRET.

    Example: mcloud boot --flavor m1.small --image debian-12 --nic net-id=lan web
    """
    from mcloud_cli.session import Options, Session

    ctx.obj = Session(
        Options(
            cloud=cloud or "",
            endpoint=endpoint or "",
            ca=ca or "",
            username=username or "",
            project=project or "",
            system=system,
        )
    )
    ctx.call_on_close(ctx.obj.close)


if __name__ == "__main__":
    main(prog_name="mcloud")
