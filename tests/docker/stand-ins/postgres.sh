#!/bin/sh
# POSTGRES_USER, POSTGRES_PASSWORD, POSTGRES_DB: made the first time, in a volume that belongs to root.
set -eu
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
data=/var/lib/postgresql/data
as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
if [ ! -s "$data/PG_VERSION" ]; then
    mkdir -p "$data"
    chown postgres:postgres "$data"
    chmod 700 "$data"
    printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/password
    chmod 644 /tmp/password
    as_postgres initdb --username "$POSTGRES_USER" --pwfile /tmp/password --auth scram-sha-256 --no-sync "$data"
    echo 'host all all all scram-sha-256' >> "$data/pg_hba.conf"
    echo "CREATE DATABASE $POSTGRES_DB" | as_postgres postgres --single -D "$data" postgres
fi
mkdir -p /var/run/postgresql
chown postgres:postgres /var/run/postgresql
exec setpriv --reuid=postgres --regid=postgres --init-groups postgres -D "$data" -c listen_addresses='*'
