//! After everything went wrong: whether all is well again by itself.

use std::time::Duration;

use anyhow::{Context, bail};
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{SERVE, cluster::Cluster, session::Session, workload, workload::Shared};

/// How long clients go on when all is healed: whatever is stuck then is stuck for good.
const CALM: Duration = Duration::from_secs(3);
/// How long clients and hands have to come to their end. A call takes ten seconds, a transaction several calls.
const END: Duration = Duration::from_secs(120);

/// Waits until every node answers.
///
/// # Errors
///
/// When one does not within a minute, or dies while nobody is there to start it again.
pub(crate) async fn wait_until_all_serve(
    session: &Session,
    cluster: &Cluster,
    watched: bool,
) -> anyhow::Result<()> {
    let began = Instant::now();
    for address in cluster.present() {
        while let Err(error) = session.client().status(&address).await {
            if began.elapsed() > SERVE {
                return Err(error).with_context(|| format!("the node at {address} does not serve"));
            }
            let death = if watched { None } else { cluster.deaths().into_iter().next() };
            if let Some(death) = death {
                bail!("node {} died at once: {}", death.node, death.why);
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
    Ok(())
}

/// Waits until everybody serves and clients get somewhere, lets them come to their end, and reads everything.
///
/// # Errors
///
/// When something of it does not come about.
pub(crate) async fn heal(
    session: &Session,
    shared: &Shared,
    cluster: &Cluster,
    clients: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let served = wait_until_all_serve(session, cluster, true).await;
    let before = shared.acknowledged();
    let began = Instant::now();
    while shared.acknowledged() == before && began.elapsed() < SERVE {
        sleep(Duration::from_millis(20)).await;
    }
    let idle = began.elapsed();
    eprintln!(
        "{:8.3} s  all is healed; the first acknowledgement came after {idle:.1?}",
        shared.clock.seconds()
    );
    sleep(CALM).await;
    shared.stop();
    end(clients, "a client").await?;
    served?;
    if idle >= SERVE {
        bail!("nothing was acknowledged for {} s after all was healed", SERVE.as_secs());
    }
    workload::read_everything(session, shared).await?;
    agree(session, cluster).await
}

/// Waits until every node has the splits that it is said to have, and no promise is left without its end.
async fn agree(session: &Session, cluster: &Cluster) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let apart = apart(session, cluster).await?;
        match apart {
            None => return Ok(()),
            Some(apart) if began.elapsed() > SERVE => {
                bail!("{} s after all was healed {apart}", SERVE.as_secs())
            }
            Some(_) => sleep(Duration::from_millis(200)).await,
        }
    }
}

/// What nodes do not agree on.
async fn apart(session: &Session, cluster: &Cluster) -> anyhow::Result<Option<String>> {
    let splits = session.client().splits().await?.splits;
    for address in cluster.present() {
        let status = session.client().status(&address).await?;
        let told = splits.iter().filter(|split| split.nodes.contains(&status.node)).count();
        if usize::try_from(status.splits).ok() != Some(told) {
            let has = status.splits;
            return Ok(Some(format!("node {} has {has} splits and is said to have {told}", status.node)));
        }
        if status.in_doubt > 0 {
            return Ok(Some(format!("node {} has {} promises in doubt", status.node, status.in_doubt)));
        }
    }
    Ok(None)
}

/// Waits for tasks that were told to stop.
///
/// # Errors
///
/// When one does not, or panicked.
pub(crate) async fn end(tasks: &mut JoinSet<()>, what: &str) -> anyhow::Result<()> {
    let all = async {
        while let Some(ended) = tasks.join_next().await {
            ended.with_context(|| format!("{what} ended badly"))?;
        }
        Ok(())
    };
    timeout(END, all).await.with_context(|| format!("{what} does not end"))?
}
