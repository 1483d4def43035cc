"""The description of the server: valid, shipped as it is defined, and with every path that there is."""

import json
from importlib.resources import files

from openapi_spec_validator import OpenAPIV31SpecValidator

from cli.schemas.api import PATHS, description_text


def test_what_is_shipped_is_what_is_defined() -> None:
    shipped = files("cli.schemas").joinpath("openapi.json").read_text(encoding="utf-8")
    assert shipped == description_text(), "python -m cli.schemas.api writes it"


def test_it_is_an_openapi_description() -> None:
    OpenAPIV31SpecValidator(json.loads(description_text())).validate()


def test_every_path_of_the_server_is_in_it() -> None:
    from cli.serve.app import make_app
    from cli.serve.guard import Access

    app = make_app(None, Access())  # type: ignore[arg-type]
    paths = {(route.path.replace(":path", ""), *route.methods - {"HEAD"}) for route in app.routes}  # type: ignore[attr-defined]
    described = {(path, method.upper()) for path, said in PATHS.items() for method in said if method != "parameters"}
    assert paths - {("/", "GET"), ("/page/{name}", "GET")} == described
