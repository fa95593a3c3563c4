"""`openapi`: the document that describes the REST API."""

import click
from flask import Flask

from order_service import api
from order_service.docs import DescribedApi
from order_service.operate.output import examples


@click.command(epilog=examples("order-service openapi > openapi.json"))
def openapi() -> None:
    """Print the OpenAPI document, as /openapi.json serves it; needs no settings."""
    app = Flask("order_service")
    described = DescribedApi(app)
    described.register_blueprint(api.blueprint)
    with app.app_context():
        click.echo(described.document(), nl=False)
