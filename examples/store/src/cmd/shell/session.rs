//! What commands do.

use std::io::Write;

use futures::future::join_all;
use store_client::{Client, Error, Moment, Reason, Txn};

use super::{
    language::{At, COMMANDS, Command, Misread, parse},
    print,
};

/// Rows of a scan, where no limit is said.
const SCAN_ROWS: usize = 100;

/// A shell's state: who it asks, and the transaction that is open.
pub(super) struct Session<W> {
    client: Client,
    txn: Option<Txn>,
    out: W,
}

/// Why a line came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error(transparent)]
    Misread(#[from] Misread),
    #[error(transparent)]
    Store(#[from] Error),
    #[error("there is no transaction; begin begins one")]
    NoTransaction,
    #[error("a transaction is open already; commit or rollback ends it")]
    Transaction,
    #[error("the output is closed")]
    Output(#[from] std::io::Error),
}

impl Failure {
    /// What might help.
    pub(super) fn hint(&self) -> Option<String> {
        match self {
            Self::Misread(misread) => misread.hint.clone(),
            Self::Store(error) => hint(error).map(str::to_owned),
            _ => None,
        }
    }
}

fn hint(error: &Error) -> Option<&'static str> {
    match (error, error.reason()) {
        (Error::Aborted(_), _) => Some("the transaction is over; begin another"),
        (Error::Unknown(_), _) => Some("read the rows to see"),
        (_, Some(Reason::UnknownTable)) => Some("create declares one; scan tables shows those there are"),
        (_, Some(Reason::ReservedTable)) => Some("create declares a table"),
        (_, Some(Reason::NoClock)) => Some("status shows which nodes have a clock"),
        (Error::Unavailable(_), _) => Some("status shows which nodes can be asked"),
        _ => None,
    }
}

/// Whether there is more to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Line,
    End,
}

impl<W: Write> Session<W> {
    pub(super) fn new(client: Client, out: W) -> Self {
        Self { client, txn: None, out }
    }

    /// Whether a transaction is open.
    pub(super) fn is_open(&self) -> bool {
        self.txn.is_some()
    }

    /// Does one line.
    pub(super) async fn line(&mut self, line: &str) -> Result<Next, Failure> {
        match parse(line)? {
            None => Ok(Next::Line),
            Some(Command::Quit) => Ok(Next::End),
            Some(command) => {
                let done = self.run(command).await;
                // A command beside it may have been aborted, too.
                if self.txn.as_ref().is_some_and(Txn::is_over) {
                    // What it still holds elsewhere is let go.
                    self.end().await;
                }
                done.map(|()| Next::Line)
            }
        }
    }

    /// Rolls back what is open.
    pub(super) async fn end(&mut self) {
        if let Some(mut txn) = self.txn.take() {
            txn.rollback().await;
        }
    }

    async fn run(&mut self, command: Command) -> Result<(), Failure> {
        match command {
            Command::Create { table, key } => {
                let key: Vec<_> = key.iter().map(|(name, kind)| (name.as_str(), *kind)).collect();
                self.client.create_table(&table, &key).await?;
                writeln!(self.out, "created {table}")?;
            }
            Command::Put { row, value } => self.write(row, Some(value)).await?,
            Command::Delete { row } => self.write(row, None).await?,
            Command::Get { rows, at } => {
                let found = match (&mut self.txn, at) {
                    (Some(txn), None) => txn.read(&rows).await?,
                    _ => {
                        let moment = self.moment(at).await?;
                        self.client.snapshot_read(&rows, moment).await?.rows
                    }
                };
                write!(self.out, "{}", print::found(&found))?;
            }
            Command::Scan { range, limit, at } => {
                let most = limit.unwrap_or(SCAN_ROWS);
                let mut found = match (&mut self.txn, at) {
                    (Some(txn), None) => txn.scan(range, most.saturating_add(1)).await?,
                    _ => {
                        let moment = self.moment(at).await?;
                        self.client.snapshot_scan(range, moment, most.saturating_add(1)).await?.rows
                    }
                };
                let more = found.len() > most;
                found.truncate(most);
                write!(self.out, "{}", print::found(&found))?;
                if more && limit.is_none() {
                    writeln!(self.out, "and more: limit N shows as many")?;
                }
            }
            Command::Begin if self.txn.is_some() => return Err(Failure::Transaction),
            Command::Begin => {
                let txn = self.client.begin().await?;
                writeln!(self.out, "began {}", txn.id())?;
                self.txn = Some(txn);
            }
            Command::Commit => {
                let mut txn = self.txn.take().ok_or(Failure::NoTransaction)?;
                let committed = txn.commit().await;
                if committed.as_ref().is_err_and(Error::nothing_written) {
                    txn.rollback().await;
                }
                writeln!(self.out, "committed at {}", committed?)?;
            }
            Command::Rollback => {
                let mut txn = self.txn.take().ok_or(Failure::NoTransaction)?;
                txn.rollback().await;
                writeln!(self.out, "rolled back")?;
            }
            Command::Splits => {
                let splits = self.client.splits().await?;
                write!(self.out, "{}", print::splits(&splits.splits))?;
            }
            Command::Split { split, at } => {
                let right = self.client.split(split, at).await?;
                writeln!(self.out, "split {split}: the right half is {right}")?;
            }
            Command::Merge { split } => {
                self.client.merge(split).await?;
                writeln!(self.out, "merged the next split into {split}")?;
            }
            Command::Move { split, from, to } => {
                self.client.move_replica(split, from, to).await?;
                writeln!(self.out, "moved split {split} from node {from} to node {to}")?;
            }
            Command::Lead { split, node } => {
                self.client.lead(split, node).await?;
                writeln!(self.out, "node {node} leads split {split}")?;
            }
            Command::Status => {
                // Whoever is not known yet is asked for.
                let known = self.client.splits().await;
                let mut addresses = self.client.addresses();
                addresses.extend(known.into_iter().flat_map(|known| known.nodes).map(|node| node.address));
                addresses.sort();
                addresses.dedup();
                let client = &self.client;
                let asked = addresses.into_iter().map(async |address| {
                    let status = client.status(&address).await;
                    (address, status)
                });
                let nodes = join_all(asked).await;
                write!(self.out, "{}", print::nodes(&nodes))?;
            }
            Command::Help => {
                for (name, arguments, what) in COMMANDS {
                    writeln!(self.out, "{:<52}  {what}", format!("{name} {arguments}"))?;
                }
            }
            Command::Quit => {}
        }
        Ok(())
    }

    async fn write(&mut self, row: store_client::Row, value: Option<Vec<u8>>) -> Result<(), Failure> {
        // A mistake is to be heard now, and not by the commit.
        self.client.table(&row.table).await?.parse(&row.key).map_err(Error::from)?;
        let write = |txn: &mut Txn, value: Option<Vec<u8>>| match value {
            Some(value) => txn.put(row.clone(), value.into()),
            None => txn.delete(row.clone()),
        };
        if let Some(txn) = &mut self.txn {
            write(txn, value);
            return Ok(());
        }
        let work = async |txn: &mut Txn| {
            write(txn, value.clone());
            Ok(())
        };
        let ((), at) = self.client.transact(work).await?;
        writeln!(self.out, "committed at {at}")?;
        Ok(())
    }

    async fn moment(&self, at: Option<At>) -> Result<Moment, Error> {
        Ok(match at {
            None => Moment::Now,
            Some(At::Timestamp(at)) => Moment::At(at),
            // By the nodes' clock, whatever this machine's says.
            Some(At::Ago(ago)) => {
                let now = self.client.begin().await?.id().started;
                Moment::At(now.saturating_sub(u64::try_from(ago.as_nanos()).unwrap_or(u64::MAX)))
            }
        })
    }
}
