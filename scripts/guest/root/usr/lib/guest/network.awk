# Picks from a flattened network_data.json what is fixed for the NIC with the MAC address `mac`:
# lines "mtu N", "address A/MASK", "route NETWORK/MASK GATEWAY", "dns A". IPv4; prints nothing for
# a network that is left to DHCP.

{ value[$1] = $2 }

END {
    for (i = 0; ("links/" i "/id") in value; i++)
        if (tolower(value["links/" i "/ethernet_mac_address"]) == mac) {
            link = value["links/" i "/id"]
            mtu = value["links/" i "/mtu"]
        }
    if (link == "") exit
    for (i = 0; ("networks/" i "/link") in value; i++) {
        network = "networks/" i
        if (value[network "/link"] != link || value[network "/type"] != "ipv4") continue
        if (mtu + 0) print "mtu", mtu
        mtu = 0
        address = value[network "/ip_address"]
        print "address", address (address ~ /\// ? "" : "/" value[network "/netmask"])
        for (j = 0; (network "/routes/" j "/gateway") in value; j++) {
            route = network "/routes/" j
            print "route", value[route "/network"] "/" value[route "/netmask"], value[route "/gateway"]
        }
        for (j = 0; (network "/services/" j "/address") in value; j++)
            print "dns", value[network "/services/" j "/address"]
        fixed = 1
    }
    for (i = 0; fixed && ("services/" i "/address") in value; i++)
        if (value["services/" i "/type"] == "dns") print "dns", value["services/" i "/address"]
}
