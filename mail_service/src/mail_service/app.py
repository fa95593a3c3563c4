"""create_app: a headless Flask app, the three probes and nothing else."""

from flask import Flask

from mail_service.models import ENGINE_OPTIONS, db
from mail_service.probes import Check, probes
from mail_service.settings import Settings


def create_app(settings: Settings, *, is_live: Check, is_ready: Check) -> Flask:
    """Build the app of a replica; what it says of itself comes from the two checks."""
    app = Flask("mail_service", static_folder=None)
    app.config.update(
        SQLALCHEMY_DATABASE_URI=settings.database_url, SQLALCHEMY_ENGINE_OPTIONS=ENGINE_OPTIONS
    )
    db.init_app(app)
    app.register_blueprint(probes(is_live=is_live, is_ready=is_ready))
    return app
