//! Why the kernel does not take the rules: which of the things they need it lacks.

use super::host::{Host, Refused};
use super::settings::Plan;
use crate::failure::Failure;

/// One thing that rules need, in the smallest rules that need it.
struct Need {
    what: &'static str,
    /// Kernel options that bring it, for whoever builds kernels.
    option: &'static str,
    chain: &'static str,
    rule: String,
}

const NAT_OUTPUT: &str = "type nat hook output priority -101;";
const FILTER_OUTPUT: &str = "type filter hook output priority filter;";
const PREROUTING: &str = "type filter hook prerouting priority mangle;";

/// Tries what `plan` needs one by one, and says what is lacking; in the kernel's own words where all of it
/// is there.
pub(super) fn explain(host: &Host, plan: &Plan, refused: &Refused) -> Failure {
    if refused.is_permission() {
        return refused.failure("cannot put the capture rules in force");
    }
    for need in needs(plan) {
        let Need { what, option, chain, rule } = need;
        let rules =
            format!("table inet palisade_probe {{\n  chain probe {{\n    {chain}\n    {rule}\n  }}\n}}\n");
        // Checked, never loaded.
        match host.nft(&["-c", "-f", "-"], &rules) {
            Ok(Ok(_)) => {}
            Ok(Err(refused)) => {
                return refused
                    .failure(&format!("this kernel, or its nft, lacks {what}, which these options need"))
                    .hint(format!("the kernel option is {option}; as a module it is loaded by itself"));
            }
            Err(failure) => return failure,
        }
    }
    refused.failure("the kernel does not take the capture rules")
}

fn needs(plan: &Plan) -> Vec<Need> {
    let need = |what, option, chain, rule: &str| Need { what, option, chain, rule: rule.to_owned() };
    let mut needs =
        vec![need("nftables for both IP families", "CONFIG_NF_TABLES_INET", FILTER_OUTPUT, "accept")];
    if plan.outbound_port.is_some() {
        needs.push(need("NAT of what this host sends", "CONFIG_NFT_NAT", NAT_OUTPUT, "accept"));
        let redirect = "meta l4proto tcp redirect to :1";
        needs.push(need("REDIRECT", "CONFIG_NFT_REDIR", NAT_OUTPUT, redirect));
    }
    if plan.inbound_port.is_some() {
        let v4 = "meta nfproto ipv4 meta l4proto tcp tproxy ip to 127.0.0.1:1";
        let v6 = "meta nfproto ipv6 meta l4proto tcp tproxy ip6 to [::1]:1";
        needs.push(need("TPROXY for IPv4", "CONFIG_NFT_TPROXY with CONFIG_NF_TPROXY_IPV4", PREROUTING, v4));
        needs.push(need("TPROXY for IPv6", "CONFIG_NFT_TPROXY with CONFIG_NF_TPROXY_IPV6", PREROUTING, v6));
        needs.push(need("connection tracking", "CONFIG_NFT_CT", PREROUTING, "ct direction reply return"));
        let mark = "ct mark set ct mark or 0x1";
        needs.push(need("marks on connections", "CONFIG_NF_CONNTRACK_MARK", PREROUTING, mark));
        let reject = "meta l4proto tcp reject with tcp reset";
        needs.push(need("reject before routing (Linux 5.9)", "CONFIG_NFT_REJECT_INET", PREROUTING, reject));
    }
    if plan.inbound_port.is_some() || plan.guard_loopback {
        let fib = "fib daddr type local return";
        needs.push(need("fib, which tells this host's addresses", "CONFIG_NFT_FIB_INET", PREROUTING, fib));
    }
    if plan.guard_loopback {
        let reject = "meta l4proto tcp reject with tcp reset";
        needs.push(need("reject", "CONFIG_NFT_REJECT_INET", FILTER_OUTPUT, reject));
    }
    needs.extend(plan.exclude_cgroups.iter().map(|cgroup| Need {
        what: "`socket cgroupv2` (Linux 5.13), which --exclude-cgroup needs",
        option: "CONFIG_NFT_SOCKET with CONFIG_CGROUPS",
        chain: NAT_OUTPUT,
        rule: format!("socket cgroupv2 level {} \"{}\" return", cgroup.level, cgroup.nft_path),
    }));
    needs
}
