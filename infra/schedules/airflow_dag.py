"""Airflow: bring the index up to date every night on a standing Ray cluster.

Put this file into the DAGs folder. Needs `ray[default]` of the cluster's version on Airflow's workers, and a
connection `refrag_ray`: its host is the cluster's dashboard (http://…:8265), its password the cluster's token.
"""

from datetime import timedelta

import pendulum
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

BUILD = (
    "ray job submit -- refrag-job index build s3://example-bucket/documents --output s3://example-bucket/index "
    "--checkpoint /models/checkpoint --retriever /models/retriever "
    "--engine ray --device cuda --device-workers 1:4 --wait-for-nodes 900"
)

with DAG(
    dag_id="refrag_nightly",
    description="Bring the refrag index up to date",
    schedule="0 2 * * *",
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    catchup=False,  # one build takes in all that nights without one have missed
    max_active_runs=1,
) as dag:
    BashOperator(
        task_id="build",
        bash_command=BUILD,
        env={
            "RAY_ADDRESS": "{{ conn.refrag_ray.host }}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": "{{ conn.refrag_ray.password }}",
        },
        append_env=True,
        retries=2,  # a repeated build goes on where the last one stopped
        retry_delay=timedelta(minutes=10),
        execution_timeout=timedelta(hours=23),
    )
