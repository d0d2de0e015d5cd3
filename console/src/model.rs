//! What the pages show, and where it comes from.

use futures::future::BoxFuture;

/// Where the pages get what they show. Implemented by the process that serves the console.
///
/// Every call is made for one page view or one live update, so an answer should come from memory or
/// one read of a database. What it returns is shown to whoever holds the console's link: never put a
/// secret's value, a token or a request body in it.
pub trait ReadModel: Send + Sync + 'static {
    /// The mesh right now.
    fn overview(&self) -> BoxFuture<'_, Overview>;
    /// The newest `limit` decisions, newest first.
    fn decisions(&self, limit: usize) -> BoxFuture<'_, Vec<DecisionRow>>;
    /// One decision with its explanation, if it is still kept.
    fn decision(&self, receipt: &str) -> BoxFuture<'_, Option<DecisionDetail>>;
    /// What control counts, as Prometheus reads it (OpenMetrics 1.0).
    fn metrics(&self) -> BoxFuture<'_, String>;
    /// A number that grows with every change worth showing; open pages re-render on it. A receiver
    /// that lags loses nothing: the next render shows the present.
    fn changes(&self) -> tokio::sync::broadcast::Receiver<u64>;
}

/// The mesh right now.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overview {
    /// The trust domain's name, such as `bank.example`.
    pub trust_domain: String,
    /// When the authority's own certificate ends, in seconds since the Unix epoch.
    pub authority_expires: u64,
    /// Every identity in force, in any order.
    pub identities: Vec<IdentityRow>,
    /// Every node that has joined, in any order.
    pub nodes: Vec<NodeRow>,
    /// Requests allowed since the control process started counting.
    pub allowed: u64,
    /// Requests denied in the same time.
    pub denied: u64,
    /// The policies, where control hands them out.
    pub policies: Option<PoliciesRow>,
}

/// Which policies are in force.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PoliciesRow {
    /// The commit that is, and since when, in seconds since the Unix epoch.
    pub in_force: Option<(String, u64)>,
    /// The commit that is on its way, and the ring that it has come to.
    pub rolling: Option<(String, String)>,
    /// The commit that was taken back last, and why.
    pub stopped: Option<(String, String)>,
    /// Why the repository's newest commit is not taken.
    pub problem: Option<String>,
    /// Who decides by them, in any order.
    pub holders: Vec<HolderRow>,
}

/// One process that decides by policies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HolderRow {
    /// Whose policies.
    pub service: String,
    /// Where.
    pub host: String,
    /// Which of several there.
    pub name: String,
    /// The commit that is in force there; `None` for none, or one that control does not know.
    pub commit: Option<String>,
    /// Whether any is.
    pub has_some: bool,
    /// Whether it is the one that should be.
    pub as_wanted: bool,
    /// Which it does not take, and why.
    pub refused: Option<String>,
}

/// One X.509-SVID in force: the newest of its SPIFFE ID on its node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityRow {
    /// Whose it is.
    pub spiffe_id: String,
    /// The certificate's serial number, in hex.
    pub serial: String,
    /// `notAfter`, in seconds since the Unix epoch.
    pub expires: u64,
    /// Why its holder has it: the registration and the selectors that matched, in words.
    pub why: String,
}

/// One host that runs an agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRow {
    /// The host's name.
    pub host: String,
    /// Its agent's SPIFFE ID.
    pub spiffe_id: String,
    /// When its agent was last heard from, in seconds since the Unix epoch; now, while it is connected.
    pub last_seen: u64,
}

/// What was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The request was forwarded.
    Allowed,
    /// The request was refused with its receipt.
    Denied,
}

/// One decision, as a line of the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecisionRow {
    /// Its receipt id: letters, digits, `-` and `_`.
    pub receipt: String,
    /// When, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// The service whose sidecar (or the gateway that) decided.
    pub service: String,
    /// What was decided.
    pub verdict: Verdict,
    /// The workload or client that asked: a SPIFFE ID, or a client id at the gateway.
    pub principal: String,
    /// The person it asked for, if any.
    pub user: Option<String>,
    /// The action as the policy names it.
    pub action: String,
    /// The objects concerned, as the policy names them.
    pub objects: Vec<String>,
    /// The policy that decided, with its file and line; none if no policy spoke.
    pub rule: Option<String>,
    /// Why, in a few words.
    pub reason: String,
}

/// One decision in full.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecisionDetail {
    /// Its line of the list.
    pub row: DecisionRow,
    /// The explanation as `palisade explain` prints it: plain text, many lines.
    pub text: String,
}
