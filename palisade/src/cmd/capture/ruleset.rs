//! The rules, as `nft -f` reads them.

use std::fmt::Display;

use ipnet::IpNet;

use super::settings::Plan;

/// The one table, of family inet.
pub(super) const TABLE: &str = "palisade";
/// The chain whose comments say who wrote the table and with which options.
pub(super) const WRITTEN_BY: &str = "written_by";
/// Its first comment: a table without it is not ours.
pub(super) const MARKER: &str = "palisade sidecar capture on";
/// On captured inbound packets and connections. A single bit that kube-proxy (0x4000, 0x8000), Tailscale
/// (0xff0000), Calico (0xffff0000), Cilium (0x0f00) and Istio (0x539) leave alone.
pub(super) const MARK: u32 = 0x1000;
/// Before the destination NAT of everybody else (-100), who could otherwise lead connections away first.
const BEFORE_OTHERS_NAT: i32 = -101;
/// A connection's first packet. Connections from before the rules are never seen to begin, and go on.
const BEGINS: &str = "tcp flags & (fin | syn | rst | ack) == syn";
const GOES_ON: &str = "tcp flags & (fin | syn | rst | ack) != syn";

/// The transaction that puts `plan` in force in place of what this table held before.
pub(super) fn render(plan: &Plan) -> String {
    let mut rules = Rules::default();
    rules.line(format_args!("table inet {TABLE}"));
    rules.line(format_args!("delete table inet {TABLE}"));
    rules.open(format_args!("table inet {TABLE}"));
    written_by(&mut rules, plan);
    if let Some(port) = plan.outbound_port {
        outbound(&mut rules, plan, port);
    }
    if let Some(port) = plan.inbound_port {
        inbound(&mut rules, plan, port);
    }
    if plan.guard_loopback {
        guard(&mut rules, plan);
    }
    rules.close();
    rules.text
}

fn written_by(rules: &mut Rules, plan: &Plan) {
    rules.open(format_args!("chain {WRITTEN_BY}"));
    rules.line(format_args!("return comment \"{MARKER}\""));
    for word in plan.words() {
        rules.line(format_args!("return comment \"{word}\""));
    }
    rules.close();
}

/// What processes of this host dial. Only a connection's first packet comes here: it is a NAT chain.
fn outbound(rules: &mut Rules, plan: &Plan, port: u16) {
    rules.open("chain outbound");
    rules.line(format_args!("type nat hook output priority {BEFORE_OTHERS_NAT}; policy accept;"));
    rules.line("meta l4proto != tcp return");
    rules.line(format_args!("{GOES_ON} return"));
    // A socket that nobody owns any more matches none of these, and is captured.
    rules.each("meta skuid", plan.uid, "return comment \"the sidecar's own\"");
    rules.each("meta skgid", plan.gid, "return comment \"the sidecar's own\"");
    rules.each("meta skuid", &plan.exclude_uids, "return");
    for cgroup in &plan.exclude_cgroups {
        let (level, path) = (cgroup.level, &cgroup.nft_path);
        rules.line(format_args!("socket cgroupv2 level {level} \"{path}\" return"));
    }
    rules.each("meta skuid !=", &plan.app_uids, "return");
    rules.line("ip daddr 127.0.0.0/8 return");
    rules.line("ip6 daddr ::1 return");
    rules.networks("daddr", &plan.exclude_cidrs, "return");
    rules.each("tcp dport", plan.passing_outbound_ports(), "return");
    rules.line(format_args!("meta l4proto tcp counter redirect to :{port} comment \"captured outbound\""));
    rules.close();
}

/// What other hosts dial.
fn inbound(rules: &mut Rules, plan: &Plan, port: u16) {
    rules.open("chain inbound");
    rules.line("type filter hook prerouting priority mangle; policy accept;");
    rules.line("meta l4proto != tcp return");
    // Loopback carries the sidecar to its app, and whatever this host dials at its own addresses, which is
    // captured when it goes out.
    rules.line("iifname \"lo\" return");
    // Answers to what was dialled from here or through here.
    rules.line("ct direction reply return");
    rules.each("tcp dport", plan.passing_inbound_ports(), "return");
    rules.each("tcp dport !=", &plan.app_ports, "return");
    rules.line("fib daddr type local goto to_sidecar");
    rules.networks("daddr", &plan.virtual_cidrs, "goto to_sidecar");
    rules.close();

    rules.open("chain to_sidecar");
    rules.line(format_args!("{BEGINS} counter comment \"captured inbound\""));
    // Where no socket takes the packet, these two do not match, and the next rules see it.
    let take = format!("meta mark set meta mark or {MARK:#x} ct mark set ct mark or {MARK:#x} accept");
    rules.line(format_args!("meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:{port} {take}"));
    rules.line(format_args!("meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:{port} {take}"));
    // Without a sidecar nothing begins, and nothing that began with it goes on without it.
    rules.line(format_args!("{BEGINS} counter reject with tcp reset comment \"refused, no sidecar\""));
    rules.line(format_args!("ct mark and {MARK:#x} == {MARK:#x} reject with tcp reset"));
    rules.close();
}

/// Who may dial what on this host itself.
fn guard(rules: &mut Rules, plan: &Plan) {
    rules.open("chain loopback_guard");
    rules.line("type filter hook output priority filter; policy accept;");
    rules.line("meta l4proto != tcp return");
    rules.line(format_args!("{GOES_ON} return"));
    rules.line("fib daddr type != local return");
    let sidecar = list(plan.outbound_port.iter().chain(&plan.call_ports));
    if let Some(ports) = sidecar {
        if let Some(users) = list(plan.app_uids.iter().chain(&plan.uid)) {
            rules.line(format_args!("tcp dport {ports} meta skuid {users} return"));
        }
        rules.line(format_args!(
            "tcp dport {ports} counter reject with tcp reset comment \"refused, not the app\""
        ));
    }
    if let Some(ports) = list(&plan.app_ports) {
        rules.each(format_args!("tcp dport {ports} meta skuid"), plan.uid, "return");
        rules.line(format_args!(
            "tcp dport {ports} counter reject with tcp reset comment \"refused, not the sidecar\""
        ));
    }
    rules.close();
}

/// A set without a name; `None` where it would be empty, which nft does not take.
fn list(values: impl IntoIterator<Item: Display>) -> Option<String> {
    let values: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    (!values.is_empty()).then(|| format!("{{ {} }}", values.join(", ")))
}

/// Lines, indented by how deep they are.
#[derive(Default)]
struct Rules {
    text: String,
    depth: usize,
}

impl Rules {
    fn line(&mut self, line: impl Display) {
        self.text.push_str(&format!("{}{line}\n", "  ".repeat(self.depth)));
    }

    fn open(&mut self, what: impl Display) {
        self.line(format_args!("{what} {{"));
        self.depth += 1;
    }

    fn close(&mut self) {
        self.depth = self.depth.saturating_sub(1);
        self.line("}");
    }

    /// One rule for what matches any of `values`, and none where there are none.
    fn each(&mut self, field: impl Display, values: impl IntoIterator<Item: Display>, verdict: &str) {
        if let Some(values) = list(values) {
            self.line(format_args!("{field} {values} {verdict}"));
        }
    }

    fn networks(&mut self, field: &str, networks: &[IpNet], verdict: &str) {
        self.each(format_args!("ip {field}"), networks.iter().filter(|net| net.addr().is_ipv4()), verdict);
        self.each(format_args!("ip6 {field}"), networks.iter().filter(|net| net.addr().is_ipv6()), verdict);
    }
}
