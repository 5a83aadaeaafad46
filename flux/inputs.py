"""Options that name pictures: what they say together, and the parts of a request that they make.

Options are by the names of the command line's, as `flux.metadata.OPTIONS` has them.
"""

from collections.abc import Mapping
from typing import Any

from flux import metadata
from flux.conditioning import ControlInput, Edit, Picture
from flux.conditioning.edit import ALPHA
from flux.conditioning.redux import check_strength
from flux.errors import FluxError

Options = Mapping[str, Any]
EDIT = ("strength", "mask", "expand", "fit", "grow", "feather", "crop_mask", "no_keep")  # beside the picture


def names(options: Options) -> list[str]:
    """The picture files that the arguments name, each once."""
    mask = None if options["mask"] == ALPHA else options["mask"]
    given = [options["image"], mask, *(options["reference"] or ()), *(options["control"] or ())]
    given += [name for name, _ in options["redux"] or ()]
    return list(dict.fromkeys(name for name in given if name))


def check(options: Options, defaults: Options) -> None:
    """FluxError for options that do not go together, before a picture is read."""
    if options["image"] is None:
        check_no_edit(options, defaults)
    elif options["fit"] != defaults["fit"] and options["image_size"] is None:
        raise FluxError("--fit says how a picture becomes one of another size; name it with --image-size")
    check_controlnets(options)
    if not options["redux"] and (options["redux_blend"] or options["redux_model"] or options["siglip"]):
        raise FluxError("--redux-blend, --redux-model and --siglip are of pictures; name one with --redux")
    for name, strength in options["redux"] or ():
        check_strength(name, strength)


def check_no_edit(options: Options, defaults: Options) -> None:
    """FluxError for what only a picture that is changed has."""
    for name in EDIT:
        if options[name] != defaults[name]:
            raise FluxError(f"--{name.replace('_', '-')} needs the picture that is changed: --image")


def check_controlnets(options: Options) -> None:
    """FluxError for options of control pictures that do not go together."""
    number, pictures = len(options["controlnet"] or ()), len(options["control"] or ())
    for name in metadata.CONTROLNETS:
        if options[name] and name != "control" and not number:
            raise FluxError(f"--{name.replace('_', '-')} is of a ControlNet; name it with --controlnet")
    if options["control_edges"] and not pictures:
        raise FluxError("--control-edges is of a control picture; name it with --control")
    if not number and pictures > 1:
        raise FluxError("--control is given once for a model, or once for each --controlnet")
    if number and number != pictures:
        raise FluxError(
            f"{number} ControlNet(s) and {pictures} control picture(s): give a --control for each, in order"
        )
    for name in metadata.CONTROLNETS if number else ():
        if len(options[name] or ()) not in (0, 1, number):
            option = f"--{name.replace('_', '-')}"
            raise FluxError(f"{option}: give one for all ControlNets, or {number}, one for each")


def to_edit(options: Options, pictures: Mapping[str, Picture]) -> Edit | None:
    """The picture that is changed, if any."""
    if options["image"] is None:
        return None
    return Edit(
        image=pictures[options["image"]],
        strength=options["strength"],
        mask=pictures.get(options["mask"], options["mask"]),
        expand=options["expand"] and tuple(map(int, options["expand"].split(","))),
        fit=options["fit"],
        grow=options["grow"],
        feather=options["feather"],
        crop_mask=options["crop_mask"],
        keep=not options["no_keep"],
    )


def to_controls(options: Options, pictures: Mapping[str, Picture]) -> tuple[ControlInput, ...]:
    """What each ControlNet is told."""
    number = len(options["controlnet"] or ())
    if not number:
        return ()

    def each(given: list | None, default: object) -> list:
        values = given or [default]
        return values if len(values) == number else values * number

    given = zip(
        options["control"] or (),
        each(options["control_mode"], None),
        each(options["control_strength"], 1.0),
        each(options["control_start"], 0.0),
        each(options["control_end"], 1.0),
        strict=True,
    )
    return tuple(
        ControlInput(
            pictures[name], None if mode == "none" else mode, strength, start, end, options["control_edges"]
        )
        for name, mode, strength, start, end in given
    )
