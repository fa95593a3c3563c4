"""The limits: a bare Flask route, and one with an INSERT and its COMMIT; runs in .venv/order."""

import os

from flask import Flask, request
from sqlalchemy import create_engine, text

from order_service.models import ENGINE_OPTIONS

_INSERT = text("INSERT INTO benchmark_rows (email, body) VALUES (:email, :body)")


def create_app() -> Flask:
    """Build an application of two routes without anything that the order service adds."""
    app = Flask("bare")
    engine = create_engine(os.environ["DATABASE_URL"], **ENGINE_OPTIONS)

    @app.get("/readyz")
    def readyz() -> str:
        return "ok"

    @app.post("/route")
    def route() -> tuple[dict[str, bool], int]:
        return {"done": True}, 201

    @app.post("/insert")
    def insert() -> tuple[dict[str, bool], int]:
        row = {"email": request.get_json()["email"], "body": request.get_data()}
        with engine.begin() as connection:
            connection.execute(_INSERT, row)
        return {"done": True}, 201

    return app
