"""Orders and events as the order service writes them, many at once and by SQL alone."""

from psycopg2.extensions import connection

# Ids ascend with their time, as UUIDv7 does. An event has two items and some 700 bytes.
_INSERT = """
    WITH made AS MATERIALIZED (
        SELECT gen_random_uuid() AS order_id, now() AS ordered_at,
               (lpad(to_hex((extract(epoch FROM clock_timestamp()) * 1000)::bigint), 12, '0')
                || '7' || substr(md5(random()::text), 1, 3)
                || 'a' || substr(md5(random()::text), 1, 15))::uuid AS event_id
          FROM generate_series(1, %(count)s)
    ), said AS (
        SELECT made.*, to_char(ordered_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"') AS at
          FROM made
    ), placed AS (
        INSERT INTO orders (id, user_id, email, locale, currency, amount, ordered_at)
        SELECT order_id, 'backlog', 'minji@example.com', 'ko', 'KRW', 24000, ordered_at FROM said
    )
    INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, occurred_at)
    SELECT event_id, 'order', order_id, 'order.created.v1',
           convert_to(json_build_object(
               'orderId', order_id, 'userId', 'backlog', 'amount', '24000',
               'email', 'minji@example.com', 'currency', 'KRW', 'locale', 'ko', 'orderedAt', at,
               'items', json_build_array(
                   json_build_object('sku', 'TEA-GREEN-50', 'name', '보성 녹차 50g',
                                     'quantity', 1, 'unitPrice', '12000'),
                   json_build_object('sku', 'CUP-WHITE', 'name', '백자 찻잔',
                                     'quantity', 1, 'unitPrice', '12000')))::text
               || repeat(' ', %(padding_bytes)s), 'UTF8'),
           json_build_object(
               'ce_specversion', '1.0', 'ce_id', event_id, 'ce_source', '/order-service',
               'ce_type', 'order.created.v1', 'ce_time', at, 'ce_subject', order_id,
               'ce_dataschema', 'urn:order-created:v1', 'content-type', 'application/json'),
           ordered_at
      FROM said
    RETURNING aggregateid
"""


def insert(session: connection, count: int, *, padding_bytes: int = 0) -> list[str]:
    """Add orders with their events in INIT to the caller's transaction; return the order ids."""
    with session.cursor() as cursor:
        cursor.execute(_INSERT, {"count": count, "padding_bytes": padding_bytes})
        return [order_id for (order_id,) in cursor.fetchall()]
